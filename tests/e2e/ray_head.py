"""A Ray head in a session of its own, given its Serve config as `serve deploy` gives it."""

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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

HOST = "127.0.0.1"
START_SECONDS = 300
POLL_SECONDS = 0.5


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
def ray_head(cpus: int, dashboard: int, **environment: str) -> Iterator[None]:
    """A head that offers as many CPUs, whatever the machine has; Serve ends with it."""
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
    inherited = os.environ | environment
    inherited |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    inherited.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=inherited,
        start_new_session=True,
    )
    try:
        yield
        # Without this, `ray start` waits half a minute for Serve's actors.
        ask(dashboard, "DELETE", "/api/serve/applications/")
    finally:
        head = psutil.Process(process.pid)
        family = [head, *head.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def applications(dashboard: int) -> dict[str, dict[str, Any]]:
    """What Serve says of each application, by name."""
    _status, text = ask(dashboard, "GET", "/api/serve/applications/")
    found: dict[str, dict[str, Any]] = json.loads(text)["applications"]
    return found


def put(dashboard: int, config: dict[str, Any]) -> None:
    """Give Ray a Serve config; fails with its own words where it is refused."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            status, text = ask(dashboard, "PUT", "/api/serve/applications/", config)
        except OSError as error:
            status, text = 503, f"Ray's dashboard does not answer: {error}"
        if status == 200:
            return
        if status < 500 or time.monotonic() > deadline:
            pytest.fail(f"the config is refused: {text}", pytrace=False)
        time.sleep(POLL_SECONDS)


def deploy(dashboard: int, config: dict[str, Any]) -> None:
    """Put the config to Ray and wait until its applications run; fails with Serve's own message."""
    put(dashboard, config)
    deadline = time.monotonic() + START_SECONDS
    state = ""
    while time.monotonic() < deadline:
        there = applications(dashboard).values()
        statuses = {one["status"] for one in there}
        state = "\n".join(_messages(there))
        if statuses == {"RUNNING"}:
            return
        if statuses & {"DEPLOY_FAILED", "UNHEALTHY"}:
            break
        # Ray tells nobody when a deployment is done: the operator polls, too.
        time.sleep(POLL_SECONDS)
    pytest.fail(f"the application does not run: {state}", pytrace=False)


def _messages(there: Iterable[dict[str, Any]]) -> Iterator[str]:
    for application in there:
        for part in (application, *application["deployments"].values()):
            yield f"{part['name']}: {part['status']}: {part['message']}"
