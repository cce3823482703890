"""The rendered overlays against the schemas of Kubernetes and of KubeRay's custom resource."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator

from tests.conftest import ROOT

KUBERNETES = "1.37"
OVERLAYS = ("local-cpu", "gpu-single-node", "gpu-multi-node")
# Their schemas are not Kubernetes' own: their operators bring them.
CUSTOM = {"RayService", "PodMonitor", "PrometheusRule", "GRPCRoute", "HTTPRoute"}
SCHEMA = ROOT.parent / "shared/kuberay/rayservice-v1.7.0.schema.json"

Objects = list[dict[str, Any]]


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, render: Callable[[str], Objects]) -> Objects:
    return copy.deepcopy(render(request.param))


@pytest.fixture
def service(objects: Objects) -> dict[str, Any]:
    (service,) = [item for item in objects if item["kind"] == "RayService"]
    return service


@pytest.fixture
def spec(service: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = service["spec"]
    return spec


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates, the head's first."""
    cluster = spec["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def containers(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod."""
    for template in templates(spec):
        for container in (
            template["spec"].get("initContainers", []) + template["spec"]["containers"]
        ):
            yield container, template["spec"]


def without_nulls(value: Any) -> Any:
    """As the API server stores it: a null field is a missing field."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """The schema's defaults put in, as the API server does before it validates."""
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        defaults = {name: part["default"] for name, part in parts.items() if "default" in part}
        return {
            name: with_defaults(item, parts.get(name, {}))
            for name, item in (defaults | value).items()
        }
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


@pytest.fixture(scope="module")
def crd_errors() -> Callable[[dict[str, Any]], list[str]]:
    """What KubeRay's CRD says against an object."""
    if not SCHEMA.is_file():
        pytest.skip(f"KubeRay's schema is not at {SCHEMA}")
    schema = json.loads(SCHEMA.read_text())
    validator = Draft202012Validator(schema)

    def errors(item: dict[str, Any]) -> list[str]:
        item = with_defaults(without_nulls(item), schema)
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(item)]

    return errors


def test_rayservice_is_what_the_crd_takes(
    service: dict[str, Any], crd_errors: Callable[[dict[str, Any]], list[str]]
) -> None:
    assert service["apiVersion"] == "ray.io/v1"
    assert crd_errors(service) == []


def test_the_crd_refuses_a_misspelt_field(
    service: dict[str, Any], crd_errors: Callable[[dict[str, Any]], list[str]]
) -> None:
    service["spec"]["rayClusterConfig"]["headGroupSpecs"] = {}
    assert any("headGroupSpecs" in error for error in crd_errors(service))


def test_other_objects_are_what_kubernetes_takes(objects: Objects) -> None:
    others = [item for item in objects if item["kind"] not in CUSTOM]
    kinds = {item["kind"] for item in others}
    assert kinds >= {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"}
    for item in others:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_pods_and_service_are_what_kubernetes_takes(spec: dict[str, Any]) -> None:
    """The CRD's copy of these types says less than Kubernetes' own."""
    for template in templates(spec):
        metadata = {"name": "pod", **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    serve = {"apiVersion": "v1", "kind": "Service", **spec["serveService"]}
    kubernetes_validate.validate(serve, KUBERNETES, strict=True)


def test_only_what_is_meant_to_be_applied_is_rendered(objects: Objects) -> None:
    assert not [item for item in objects if "local-config" in str(item["metadata"])]
    assert not [item for item in objects if item["kind"] == "Secret"]


def test_images_are_pinned(spec: dict[str, Any]) -> None:
    for container, _pod in containers(spec):
        _name, _, tag = container["image"].rpartition(":")
        assert tag, container["image"]
        assert "latest" not in tag


def test_nothing_secret_is_written_down(spec: dict[str, Any]) -> None:
    for container, _pod in containers(spec):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("TOKEN", "SECRET", "PASSWORD", "KEY")):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]
                assert "value" not in variable


def test_containers_hold_no_privileges(objects: Objects, spec: dict[str, Any]) -> None:
    sets = [item["spec"]["template"]["spec"] for item in objects if item["kind"] == "StatefulSet"]
    for pod in (*sets, *(template["spec"] for template in templates(spec))):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        secured = [container["securityContext"] for container in pod["containers"]]
        if pod.get("automountServiceAccountToken") is not False:
            secured.append(autoscaler_options(spec)["securityContext"])
        for security in secured:
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}


def autoscaler_options(spec: dict[str, Any]) -> dict[str, Any]:
    """Only where Ray's autoscaler runs has a pod to do with the Kubernetes API."""
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    options: dict[str, Any] = spec["rayClusterConfig"]["autoscalerOptions"]
    assert options["version"] == "v2"
    return options


def test_accounts_and_volumes_that_are_named_are_there(
    objects: Objects, spec: dict[str, Any]
) -> None:
    named = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for template in templates(spec):
        pod = template["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in named
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in named


def test_policies_and_budgets_select_the_pods_they_mean(
    objects: Objects, spec: dict[str, Any]
) -> None:
    labels = [template["metadata"]["labels"] for template in templates(spec)]
    labels += [
        item["spec"]["template"]["metadata"]["labels"]
        for item in objects
        if item["kind"] == "StatefulSet"
    ]
    for item in objects:
        selector = {
            "NetworkPolicy": lambda item: item["spec"]["podSelector"],
            "PodDisruptionBudget": lambda item: item["spec"]["selector"],
            "PodMonitor": lambda item: item["spec"]["selector"],
        }.get(item["kind"])
        if selector is not None:
            wanted = selector(item)["matchLabels"].items()
            assert any(wanted <= pod.items() for pod in labels), item["metadata"]["name"]


def test_routes_lead_to_the_service(objects: Objects, spec: dict[str, Any]) -> None:
    serve = spec["serveService"]
    ports = {port["port"] for port in serve["spec"]["ports"]}
    for item in objects:
        if item["kind"] in ("GRPCRoute", "HTTPRoute"):
            assert item["apiVersion"] == "gateway.networking.k8s.io/v1"
            for rule in item["spec"]["rules"]:
                for backend in rule["backendRefs"]:
                    assert backend["name"] == serve["metadata"]["name"]
                    assert backend["port"] in ports


def test_the_head_outlives_its_pod_where_redis_stands(
    objects: Objects, spec: dict[str, Any]
) -> None:
    stores = [item for item in objects if item["kind"] == "StatefulSet"]
    options = spec["rayClusterConfig"].get("gcsFaultToleranceOptions")
    assert bool(stores) == bool(options)
    for store in stores:
        host, _, port = options["redisAddress"].partition(":")
        assert host == store["spec"]["serviceName"]
        (container,) = store["spec"]["template"]["spec"]["containers"]
        assert [int(port)] == [entry["containerPort"] for entry in container["ports"]]
        (password,) = container["env"]
        assert options["redisPassword"]["valueFrom"] == password["valueFrom"]


def test_what_ray_writes_to_is_writable(spec: dict[str, Any]) -> None:
    """The root is read-only, so each of these has a volume that is not a Secret."""
    for container, pod in containers(spec):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        for path in ("/tmp", "/home/headwise", "/dev/shm"):
            assert not mounts[path].get("readOnly")
            assert "emptyDir" in volumes[mounts[path]["name"]], path
        shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
        assert shared["medium"] == "Memory"


def test_image_and_pods_agree(spec: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for container, pod in containers(spec):
        user = pod["securityContext"]["runAsUser"]
        group = pod["securityContext"]["runAsGroup"]
        assert f"USER {user}:{group}\n" in dockerfile
        assert f"--uid {user} --gid {group} --create-home headwise" in dockerfile
        assert "/home/headwise" in {mount["mountPath"] for mount in container["volumeMounts"]}
