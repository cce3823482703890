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
SCHEMA = ROOT.parent / "shared/kuberay/rayservice-v1.7.0.schema.json"

Objects = list[dict[str, Any]]


@pytest.fixture(params=["local-cpu", "gpu-single-node"])
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
    others = [item for item in objects if item["kind"] != "RayService"]
    assert "ServiceAccount" in {item["kind"] for item in others}
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
    assert {item["kind"] for item in objects} <= {
        "RayService",
        "ServiceAccount",
        "PersistentVolumeClaim",
    }


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


def test_containers_hold_no_privileges(spec: dict[str, Any]) -> None:
    for container, pod in containers(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}


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
