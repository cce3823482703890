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
from tests.conftest import MODEL, ROOT

UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

Objects = list[dict[str, Any]]


@pytest.fixture(params=["local-cpu", "gpu-single-node", "gpu-multi-node"])
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
    # Serve's own proxy stands in nobody's way, nor on anybody's port.
    assert config["proxy_location"] == "Disabled"
    (application,) = schema.applications
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    assert application.import_path == f"{build.__module__}:{build.__name__}"


def test_there_are_pods_for_the_replicas(args: AppArgs, spec: dict[str, Any]) -> None:
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    scaling = args.autoscaling
    least = args.replicas if scaling is None else scaling.min_replicas
    most = args.replicas if scaling is None else scaling.max_replicas
    assert (group["minReplicas"], group["maxReplicas"]) == (least, most)
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert bool(spec["rayClusterConfig"].get("enableInTreeAutoscaling")) == (scaling is not None)


def test_a_replica_fills_its_pods(
    args: AppArgs, spec: dict[str, Any], container: dict[str, Any]
) -> None:
    """Two in one pod would die together; half of one would wait for ever."""
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    hosts = group.get("numOfHosts", 1)
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests == limits
    pod = {"CPU": quantity(requests["cpu"]), "GPU": quantity(requests.get("nvidia.com/gpu", "0"))}
    needs = {kind: sum(bundle.get(kind, 0) for bundle in bundles(args)) for kind in pod}
    assert len(bundles(args)) == 1 + args.cluster.tensor_parallel
    assert all(needs[kind] <= hosts * pod[kind] for kind in pod)
    assert any(2 * needs[kind] > hosts * pod[kind] for kind in pod)
    if hosts > 1:
        assert args.cluster.placement in ("PACK", "SPREAD")


def test_the_operator_waits_longer_than_ranks_load(
    args: AppArgs, render: Callable[[str], Objects], overlay: str
) -> None:
    (service,) = [item for item in render(overlay) if item["kind"] == "RayService"]
    minutes = service["metadata"]["annotations"]["ray.io/initializing-timeout"]
    assert int(minutes.removesuffix("m")) * 60 > args.cluster.start_timeout_s


def test_gpus_go_with_the_device(
    args: AppArgs, spec: dict[str, Any], container: dict[str, Any]
) -> None:
    gpus = quantity(container["resources"]["limits"].get("nvidia.com/gpu", "0"))
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    ranks = args.cluster.tensor_parallel if args.cluster.device == "cuda" else 0
    assert gpus * group.get("numOfHosts", 1) == ranks


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
    args: AppArgs, spec: dict[str, Any], container: dict[str, Any]
) -> None:
    (head,) = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["targetPort"] for port in spec["serveService"]["spec"]["ports"]}
    expected = {"serve-grpc": args.server.grpc_port, "serve": args.server.http_port}
    assert ports == expected
    for name, number in expected.items():
        assert port_of(container, name) == number
        # The operator reads the Service's ports from the head's container.
        assert port_of(head, name) == number


def test_the_edge_is_reachable_and_probed(
    args: AppArgs, spec: dict[str, Any], container: dict[str, Any]
) -> None:
    assert args.server.host == "0.0.0.0"
    tls = args.server.tls_certificate is not None
    # A kubelet has no certificate to show.
    assert args.server.tls_client_ca is None
    probe = container["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/health", "serve")
    assert probe.get("scheme", "HTTP") == ("HTTPS" if tls else "HTTP")
    ports = {port["name"]: port for port in spec["serveService"]["spec"]["ports"]}
    assert ports["serve-grpc"].get("appProtocol") == (None if tls else "kubernetes.io/h2c")
    assert ports["serve"]["appProtocol"] == ("https" if tls else "http")


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


@pytest.mark.parametrize("name", ["gpu-single-node", "gpu-multi-node"])
def test_gpu_overlays_ask_for_a_token(name: str, render: Callable[[str], Objects]) -> None:
    (service,) = [item for item in render(name) if item["kind"] == "RayService"]
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
