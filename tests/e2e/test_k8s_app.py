"""The local-cpu overlay's serveConfigV2 on a local Ray, given to it as the operator gives it.

KubeRay puts serveConfigV2 to the head's `/api/serve/applications/` and then asks for its state
there; so does this. Only the model's path, the addresses and the ports are this machine's.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise import Client, FinishReason

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

HOST = "127.0.0.1"
START_SECONDS = 300
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Served:
    """Where the application answers, and the config it was started from."""

    grpc: str
    http_port: int
    config: dict[str, Any]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, str]:
    """Status and text of one HTTP call; raises OSError where nobody listens."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@contextmanager
def local_ray(cpus: int, dashboard: int) -> Iterator[None]:
    """A head with as many CPUs as the worker pod has, in a session of its own."""
    gcs, agent, runtime_env, metrics, client = free_ports(5)
    # Not pytest's folder: Ray's sockets lie below it, and their paths have to be short.
    folder = Path(tempfile.mkdtemp(prefix="hw-"))
    options = {
        "node-ip-address": HOST,
        "port": gcs,
        "dashboard-host": HOST,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "runtime-env-agent-port": runtime_env,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "num-cpus": cpus,
        "object-store-memory": 128 << 20,
        "temp-dir": folder,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        yield
    finally:
        head = psutil.Process(process.pid)
        family = [head, *head.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=60)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def messages(applications: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What Serve says of each application and of its deployments."""
    for application in applications:
        for part in (application, *application["deployments"].values()):
            yield f"{part['name']}: {part['status']}: {part['message']}"


def deploy(dashboard: int, config: dict[str, Any]) -> None:
    """Put the config to Ray and wait until its applications run; fails with Serve's own message."""
    deadline = time.monotonic() + START_SECONDS
    put = False
    state = "Ray's dashboard does not answer"
    while time.monotonic() < deadline:
        try:
            if not put:
                status, text = ask(dashboard, "PUT", "/api/serve/applications/", config)
                put = status == 200
                state = text
            else:
                _status, text = ask(dashboard, "GET", "/api/serve/applications/")
                applications = json.loads(text)["applications"].values()
                statuses = {one["status"] for one in applications}
                state = "\n".join(messages(applications))
                if statuses == {"RUNNING"}:
                    return
                if statuses & {"DEPLOY_FAILED", "UNHEALTHY"}:
                    break
        except OSError:
            pass
        # Ray tells nobody when a deployment is done: the operator polls, too.
        time.sleep(POLL_SECONDS)
    pytest.fail(f"the application does not run: {state}", pytrace=False)


@pytest.fixture(scope="module")
def served(render: Callable[[str], list[dict[str, Any]]], bundled_model: Path) -> Iterator[Served]:
    (service,) = [item for item in render("local-cpu") if item["kind"] == "RayService"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    args = config["applications"][0]["args"]
    dashboard, http_port, grpc_port = free_ports(3)
    args["cluster"]["model"] = str(bundled_model)
    args["server"] |= {"host": HOST, "grpc_port": grpc_port}
    config["http_options"] |= {"host": HOST, "port": http_port}
    with local_ray(int(container["resources"]["limits"]["cpu"]), dashboard):
        try:
            deploy(dashboard, config)
            yield Served(f"{HOST}:{grpc_port}", http_port, config)
        finally:
            # Without this, `ray start` waits half a minute for Serve's actors.
            ask(dashboard, "DELETE", "/api/serve/applications/")


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


def test_answers_the_pods_probe(
    served: Served, render: Callable[[str], list[dict[str, Any]]]
) -> None:
    (service,) = [item for item in render("local-cpu") if item["kind"] == "RayService"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    probe = container["readinessProbe"]["grpc"]
    with grpc.insecure_channel(served.grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=probe["service"])
        answer = health.Check(request, timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_answers_the_operators_probe(served: Served) -> None:
    assert ask(served.http_port, "GET", "/-/healthz") == (200, "success")


def test_health_over_http_names_every_rank(served: Served) -> None:
    status, text = ask(served.http_port, "GET", "/health")
    health = json.loads(text)
    assert status == 200
    cluster = served.config["applications"][0]["args"]["cluster"]
    assert [rank["rank"] for rank in health["ranks"]] == list(range(cluster["tensor_parallel"]))
