"""The local-cpu overlay's serveConfigV2 on a local Ray, given to it as the operator gives it.

KubeRay puts serveConfigV2 to the head's `/api/serve/applications/` and then asks for its state
there; so does this. Only the model's path, the addresses and the ports are this machine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from headwise import Client, FinishReason
from tests.e2e.ray_head import HOST, ask, deploy, free_ports, ray_head

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Served:
    """Where the application answers, and the config it was started from."""

    grpc: str
    http_port: int
    config: dict[str, Any]


@pytest.fixture(scope="module")
def served(render: Callable[[str], list[dict[str, Any]]], bundled_model: Path) -> Iterator[Served]:
    (service,) = [item for item in render("local-cpu") if item["kind"] == "RayService"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    args = config["applications"][0]["args"]
    dashboard, http_port, grpc_port = free_ports(3)
    args["cluster"]["model"] = str(bundled_model)
    args["server"] |= {"host": HOST, "grpc_port": grpc_port, "http_port": http_port}
    with ray_head(int(container["resources"]["limits"]["cpu"]), dashboard):
        deploy(dashboard, config)
        yield Served(f"{HOST}:{grpc_port}", http_port, config)


def test_streams_an_answer(served: Served) -> None:
    with (
        Client(served.grpc) as client,
        client.stream("The capital of France is", max_tokens=12, temperature=0) as stream,
    ):
        texts = [delta.text for delta in stream]
        answer = stream.result()
    assert "".join(texts) == answer.text
    assert "Paris" in answer.text
    assert len(answer.token_ids) == 12
    assert answer.finish_reason is FinishReason.LENGTH


def test_is_cut_as_the_config_says(served: Served) -> None:
    cluster = served.config["applications"][0]["args"]["cluster"]
    with Client(served.grpc) as client:
        info = client.server_info()
    assert info.tensor_parallel == cluster["tensor_parallel"]
    assert len(info.ranks) == cluster["tensor_parallel"]
    assert info.device == cluster["device"]


def test_answers_the_pods_probe_with_every_rank(
    served: Served, render: Callable[[str], list[dict[str, Any]]]
) -> None:
    (service,) = [item for item in render("local-cpu") if item["kind"] == "RayService"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    status, text = ask(served.http_port, "GET", container["readinessProbe"]["httpGet"]["path"])
    (model,) = json.loads(text)["models"]
    cluster = served.config["applications"][0]["args"]["cluster"]
    assert status == 200
    assert [rank["rank"] for rank in model["ranks"]] == list(range(cluster["tensor_parallel"]))
