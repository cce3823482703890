"""Several models and replicas on a real Ray, under clients that retry nothing.

One config after the other is put to the same Ray, as `serve deploy` puts it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.e2e.ray_head import HOST, applications, deploy, free_ports, put, ray_head
from tests.models import save, tiny_model

pytestmark = pytest.mark.timeout(300)

PROMPT = [3, 14, 15, 92, 65]
CLIENTS = 4
WAIT_SECONDS = 120


@dataclass(frozen=True)
class Cluster:
    """Where Ray takes configs, where every edge listens, and models to serve."""

    dashboard: int
    grpc_port: int
    http_port: int
    models: tuple[Path, Path]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.grpc_port}"

    def config(self, **models: dict[str, Any]) -> dict[str, Any]:
        """A config file of one application for each served name."""
        return {
            "proxy_location": "Disabled",
            "applications": [
                {
                    "name": name,
                    "route_prefix": None,
                    "import_path": "deploy.app:build",
                    "args": {
                        "served_name": name,
                        "kv_memory": "1MB",
                        "grpc_port": self.grpc_port,
                        "http_port": self.http_port,
                        "drain_timeout_s": 20,
                        "max_connection_age_s": 6,
                        **args,
                    },
                }
                for name, args in models.items()
            ],
        }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    first = save(tiny_model("llama"), tmp_path_factory.mktemp("first"))
    second = save(tiny_model("qwen2"), tmp_path_factory.mktemp("second"))
    dashboard, grpc_port, http_port = free_ports(3)
    with ray_head(
        16,
        dashboard,
        RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
        RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
    ):
        yield Cluster(dashboard, grpc_port, http_port, (first, second))


@contextmanager
def edge(address: str) -> Iterator[tuple[Any, Any]]:
    """Stubs of Inference and Control on a connection of their own. gRPC sends again what no server
    has begun, as it does by default; nothing retries what was begun."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)


def generate(inference: Any, model: str, max_tokens: int = 12) -> tuple[int, ...]:
    """The tokens of a greedy stream, which has to be whole."""
    message = inference_pb2.GenerateRequest(model=model)
    message.token_ids.ids.extend(PROMPT)
    message.sampling.temperature = 0
    message.stopping.max_tokens = max_tokens
    responses = list(inference.Generate(message, wait_for_ready=True, timeout=60))
    assert responses[-1].HasField("finish"), "the stream ended before its request"
    return tuple(token for response in responses for token in response.token_ids)


def answer(address: str, model: str, max_tokens: int = 12) -> tuple[int, ...]:
    with edge(address) as (inference, _):
        return generate(inference, model, max_tokens)


@dataclass
class Load:
    """What clients got that ran stream after stream meanwhile."""

    answers: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


@contextmanager
def running(
    address: str, model: str, max_tokens: int = 12, clients: int = CLIENTS
) -> Iterator[Load]:
    """Clients that each keep a stream going; no error may happen to any of them."""
    load, stop = Load(), threading.Event()

    def client() -> None:
        with edge(address) as (inference, _):
            while not stop.is_set():
                began = time.monotonic()
                try:
                    load.answers.append((began, generate(inference, model, max_tokens)))
                except Exception as error:
                    load.errors.append(error)

    with ThreadPoolExecutor(clients) as pool:
        futures: list[Future[None]] = [pool.submit(client) for _ in range(clients)]
        try:
            yield load
        finally:
            stop.set()
            for future in futures:
                future.result()
    assert not load.errors, load.errors[:3]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WAIT_SECONDS} s: {what}")
        time.sleep(0.1)


def replicas(cluster: Cluster, name: str, state: str = "RUNNING") -> set[str]:
    (deployment,) = applications(cluster.dashboard)[name]["deployments"].values()
    return {one["replica_id"] for one in deployment["replicas"] if one["state"] == state}


def ranks(cluster: Cluster, model: str) -> dict[str, list[int]]:
    """Pids of the ranks of each replica that the edges know."""
    found: dict[str, list[int]] = {}
    with edge(cluster.address) as (_, control):
        request = control_pb2.GetHealthRequest(model=model)
        for rank in control.GetHealth(request, wait_for_ready=True).ranks:
            found.setdefault(rank.replica, []).append(rank.pid)
    return found


def test_every_edge_answers_for_every_model_and_outlives_a_rank(cluster: Cluster) -> None:
    first, second = map(str, cluster.models)
    deploy(
        cluster.dashboard,
        cluster.config(
            # The replica goes with its rank: what is put to the test is the fleet.
            alpha={"model": first, "replicas": 2, "recoveries": 0},
            beta={"model": second},
        ),
    )
    expected = {name: answer(cluster.address, name) for name in ("alpha", "beta")}
    assert expected["alpha"] != expected["beta"]
    # The kernel deals connections to the three edges that listen on the port.
    for _ in range(12):
        with edge(cluster.address) as (inference, control):
            assert list(control.ListModels(control_pb2.ListModelsRequest()).names) == [
                "alpha",
                "beta",
            ]
            assert {name: generate(inference, name) for name in expected} == expected
    before = ranks(cluster, "alpha")
    assert len(before) == 2

    long = answer(cluster.address, "alpha", 200)
    with running(cluster.address, "alpha", 200) as load:
        until(lambda: len(load.answers) >= CLIENTS, "every client has an answer")
        (victim,) = before[min(before)]
        os.kill(victim, signal.SIGKILL)
        until(lambda: min(before) not in replicas_known(cluster), "the dead replica has left")
        until(lambda: len(ranks(cluster, "alpha")) == 2, "Serve has replaced it")
    assert {tokens for _, tokens in load.answers} == {long}


def replicas_known(cluster: Cluster) -> set[str]:
    return set(ranks(cluster, "alpha"))


def test_an_update_breaks_no_stream(cluster: Cluster) -> None:
    first, second = map(str, cluster.models)
    deploy(cluster.dashboard, cluster.config(alpha={"model": first}))
    old = answer(cluster.address, "alpha", 120)
    with running(cluster.address, "alpha", 120) as load:
        until(lambda: len(load.answers) >= CLIENTS, "every client has an answer")
        before = replicas(cluster, "alpha")
        deploy(cluster.dashboard, cluster.config(alpha={"model": second}))
        until(lambda: not before & replicas(cluster, "alpha", "STOPPING"), "the old one is gone")
        updated = time.monotonic()
        until(
            lambda: sum(began > updated for began, _ in load.answers) >= CLIENTS,
            "every client has another answer",
        )
    new = answer(cluster.address, "alpha", 120)
    assert {tokens for began, tokens in load.answers if began > updated} == {new}
    assert {tokens for _, tokens in load.answers} == {old, new}


def test_replicas_follow_the_load(cluster: Cluster) -> None:
    autoscaling = {
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "look_back_s": 2,
    }
    model = str(cluster.models[0])
    deploy(cluster.dashboard, cluster.config(alpha={"model": model, "autoscaling": autoscaling}))
    expected = answer(cluster.address, "alpha", 200)
    with running(cluster.address, "alpha", 200) as load:
        until(lambda: len(ranks(cluster, "alpha")) == 2, "there are two replicas")
    with running(cluster.address, "alpha", 200, clients=1) as light:
        until(lambda: len(replicas(cluster, "alpha")) == 1, "there is one replica")
        until(lambda: not replicas(cluster, "alpha", "STOPPING"), "the other one is gone")
    assert {tokens for _, tokens in (*load.answers, *light.answers)} == {expected}


def test_a_config_that_cannot_be_meant_is_named(cluster: Cluster) -> None:
    config = cluster.config(alpha={"model": str(cluster.models[0]), "max_sequence": 3})
    put(cluster.dashboard, config)

    def message() -> str:
        return str(applications(cluster.dashboard)["alpha"]["message"])

    until(lambda: "max_sequence" in message(), "Serve says what is wrong")
