"""serveConfigV2 of each overlay: what Serve and the application take, and what the pod holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.app import build
from deploy.args import AppArgs
from deploy.edge.health import INFERENCE
from tests.conftest import MODEL, ROOT

UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

Objects = list[dict[str, Any]]


@pytest.fixture(params=["local-cpu", "gpu-single-node"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spec(overlay: str, render: Callable[[str], Objects]) -> dict[str, Any]:
    (service,) = [item for item in render(overlay) if item["kind"] == "RayService"]
    spec: dict[str, Any] = service["spec"]
    return spec


@pytest.fixture
def config(spec: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(spec["serveConfigV2"])
    return config


@pytest.fixture
def args(config: dict[str, Any]) -> AppArgs:
    (application,) = config["applications"]
    return AppArgs.model_validate(application["args"])


@pytest.fixture
def worker(spec: dict[str, Any]) -> dict[str, Any]:
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 1
    pod: dict[str, Any] = group["template"]["spec"]
    return pod


@pytest.fixture
def container(worker: dict[str, Any]) -> dict[str, Any]:
    (container,) = worker["containers"]
    found: dict[str, Any] = container
    return found


def quantity(text: str) -> int:
    """Bytes, or a whole number, of a Kubernetes quantity."""
    return int(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else int(text)


def bundles(args: AppArgs) -> list[dict[str, float]]:
    """What a replica reserves, read from the deployment itself."""
    deployment = build(args)._bound_deployment
    found: list[dict[str, float]] = deployment._replica_config.placement_group_bundles
    return found


def port_of(container: dict[str, Any], name: str) -> int:
    (port,) = [port for port in container["ports"] if port["name"] == name]
    number: int = port["containerPort"]
    return number


def test_the_rendered_config_is_the_file(overlay: str, spec: dict[str, Any]) -> None:
    assert spec["serveConfigV2"] == (ROOT / "k8s/overlays" / overlay / "serve.yaml").read_text()


def test_serve_takes_the_config(config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(config)
    # Serve drops keys that it does not know without a word.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["http_options"]) <= set(type(schema.http_options).model_fields)
    (application,) = schema.applications
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    assert application.import_path == f"{build.__module__}:{build.__name__}"


def test_one_replica(args: AppArgs) -> None:
    assert args.replicas == 1


def test_a_replica_fits_the_pod_and_a_second_does_not(
    args: AppArgs, container: dict[str, Any]
) -> None:
    """Two in one pod would want the same gRPC port: during an update the new one waits."""
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests == limits
    room = {"CPU": quantity(requests["cpu"]), "GPU": quantity(requests.get("nvidia.com/gpu", "0"))}
    needs = {kind: sum(bundle.get(kind, 0) for bundle in bundles(args)) for kind in room}
    assert len(bundles(args)) == 1 + args.cluster.tensor_parallel
    assert all(needs[kind] <= room[kind] for kind in room)
    assert any(2 * needs[kind] > room[kind] for kind in room)


def test_gpus_go_with_the_device(args: AppArgs, container: dict[str, Any]) -> None:
    gpus = quantity(container["resources"]["limits"].get("nvidia.com/gpu", "0"))
    assert gpus == (args.cluster.tensor_parallel if args.cluster.device == "cuda" else 0)


def test_no_replica_lands_on_the_head(spec: dict[str, Any]) -> None:
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True


def test_memory_holds_what_is_reserved(
    args: AppArgs, spec: dict[str, Any], worker: dict[str, Any], container: dict[str, Any]
) -> None:
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (shared,) = [volume["emptyDir"] for volume in worker["volumes"] if volume["name"] == "shm"]
    memory = quantity(container["resources"]["limits"]["memory"])
    # /dev/shm and, on CPUs, the KV cache count as the container's memory.
    reserved = quantity(shared["sizeLimit"])
    assert int(group["rayStartParams"]["object-store-memory"]) < reserved
    assert args.cluster.kv_memory is not None
    if args.cluster.device == "cpu":
        reserved += args.cluster.kv_memory * args.cluster.tensor_parallel
    assert reserved < memory


def test_ports_are_the_same_everywhere(
    args: AppArgs, config: dict[str, Any], spec: dict[str, Any], container: dict[str, Any]
) -> None:
    (head,) = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["targetPort"] for port in spec["serveService"]["spec"]["ports"]}
    expected = {"serve-grpc": args.server.grpc_port, "serve": config["http_options"]["port"]}
    assert ports == expected
    for name, number in expected.items():
        assert port_of(container, name) == number
        # The operator reads the Service's ports from the head's container.
        assert port_of(head, name) == number


def test_the_edge_is_reachable_and_probed(args: AppArgs, container: dict[str, Any]) -> None:
    assert args.server.host == "0.0.0.0"
    # The kubelet's gRPC probe speaks no TLS.
    assert args.server.tls_certificate is None
    probe = container["readinessProbe"]["grpc"]
    assert probe == {"port": args.server.grpc_port, "service": INFERENCE}


def test_the_pod_outlives_the_drain(args: AppArgs, worker: dict[str, Any]) -> None:
    assert worker["terminationGracePeriodSeconds"] > args.server.drain_timeout_s + 10


def test_files_named_in_the_config_come_from_secrets(
    args: AppArgs, worker: dict[str, Any], container: dict[str, Any]
) -> None:
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    server = args.server
    for path in (server.token_file, server.tls_certificate, server.tls_key, server.tls_client_ca):
        if path is not None:
            secret = mounts[str(PurePosixPath(path).parent)]["secret"]
            assert secret["optional"] is False, f"{path} has to be there"


def test_gpu_overlay_asks_for_a_token(render: Callable[[str], Objects]) -> None:
    (service,) = [item for item in render("gpu-single-node") if item["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["server"]["token_file"]


def test_local_overlay_finds_its_model_in_the_image(render: Callable[[str], Objects]) -> None:
    (service,) = [item for item in render("local-cpu") if item["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (worker,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    folder = "/opt/headwise/models"
    assert f"--directory {folder}\n" in (ROOT / "deploy/Dockerfile").read_text()
    inside = MODEL.relative_to(ROOT / ".models")
    assert application["args"]["cluster"]["model"] == f"{folder}/{inside}"
    # A volume mounted there would hide it.
    assert not [m for m in container["volumeMounts"] if folder.startswith(m["mountPath"])]
