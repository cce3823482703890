"""The Ray Serve application: one deployment, whose replicas each are an edge and a driver.

`deploy.app:build` is what a Serve config file names. Serve places, starts, scales and rolls out;
tokens travel through each replica's own gRPC server. The one module of `deploy` that knows ray.
"""

# Serve looks at the builder's annotation itself: no postponed annotations in this file.

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import sys
import threading
import time
import traceback

import ray
import structlog
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.blueprint import draw_up
from cluster.driver import Driver
from cluster.request import HealthState
from cluster.shard_group import LocalRay, RayLauncher, bundles, local_cpus
from deploy.args import AppArgs, LocalRun
from deploy.edge.models import Models, Served, ServerFacts
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from deploy.preflight import require_gpus
from deploy.start_report import Failed, Progress, Ready, report
from deploy.telemetry import configure_logging
from deploy.version import version
from shards.errors import HeadwiseError

APPLICATION = "headwise"

# The edge's and the driver's own share of a machine, besides their ranks'.
REPLICA_CPUS = 1
_POLL_SECONDS = 0.1
_CALL_SECONDS = 5
# Serve kills a replica that takes longer to end than its drain and this.
_END_SECONDS = 10

log = structlog.get_logger(__name__)


class Replica:
    """A driver with its ranks, and the edge that speaks for it."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc] # Serve awaits it
        """Up when the ranks hold their weights and the port is bound, so that Serve does not
        retire an old replica before its successor can answer."""
        configure_logging(args.log_format)
        self._drain_timeout_s = args.server.drain_timeout_s
        self._driver: Driver | None = None
        self._edge: Edge | None = None
        try:
            driver = self._driver = Driver(await asyncio.to_thread(draw_up, args.cluster))
            group = ray.util.get_current_placement_group()
            launcher = RayLauncher(args.cluster, group, first_bundle=1)
            await asyncio.to_thread(driver.start, launcher, _report_progress)
            texts = Texts(driver.codec, driver.model)
            edge = Edge(Models(Served(driver, texts, _facts(args, driver))), args.server)
            await edge.start()
            self._edge = edge
        except Exception as error:
            report(failure(error))
            raise
        log.info("replica ready", address=edge.address, model=driver.model.name)

    async def info(self) -> Ready:
        """What `headwise serve` prints."""
        assert self._driver is not None
        assert self._edge is not None
        load = self._driver.load()
        return Ready(
            grpc=self._edge.address,
            model=self._driver.model,
            ranks=self._driver.ranks,
            kv_tokens=load.kv_blocks * load.block_size,
        )

    async def __call__(self, request: Request) -> Response:
        """GET /health: the state of every rank. The token path is the edge's."""
        if request.url.path.rstrip("/").rpartition("/")[2] != "health":
            return JSONResponse({"error": "only /health is served here"}, status_code=404)
        assert self._driver is not None
        health = self._driver.health()
        body = dataclasses.asdict(health)
        body["state"] = health.state.value
        for rank in body["ranks"]:
            rank["state"] = rank["state"].value
        computing = health.state in (HealthState.READY, HealthState.DEGRADED)
        return JSONResponse(body, status_code=200 if computing else 503)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here again and again."""
        assert self._driver is not None
        health = self._driver.health()
        if health.state is HealthState.NOT_READY:
            raise RuntimeError(health.cause)

    async def stop(self) -> None:
        """Finish what runs, refuse what comes, end the ranks; idempotent."""
        edge, self._edge = self._edge, None
        if edge is not None:
            await edge.stop(self._drain_timeout_s)
        if self._driver is not None:
            await asyncio.to_thread(self._driver.stop)

    async def __del__(self) -> None:
        """What Serve calls when it retires a replica."""
        await self.stop()


# Not a decorator: Serve would send the class by value, since its name would mean something else.
_DEPLOYMENT = serve.deployment(name="Replica", max_ongoing_requests=100)(Replica)


def build(args: AppArgs) -> serve.Application:
    """The application for `args`: the first bundle is the replica's, one more for each rank."""
    application: serve.Application = _DEPLOYMENT.options(
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=[{"CPU": REPLICA_CPUS}, *bundles(args.cluster)],
        placement_group_strategy=args.cluster.placement,
        graceful_shutdown_timeout_s=args.server.drain_timeout_s + _END_SECONDS,
    ).bind(args)
    return application


def failure(error: Exception) -> Failed:
    """What a user is told of an error: its sentence, and a trace where it was not expected."""
    if isinstance(error, HeadwiseError):
        return Failed(message=str(error))
    return Failed(message=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _report_progress(phase: str, done: int, total: int) -> None:
    report(Progress(phase=phase, done=done, total=total))


def _facts(args: AppArgs, driver: Driver) -> ServerFacts:
    return ServerFacts(
        version=version(),
        libraries={
            name: importlib.metadata.version(name)
            for name in ("ray", "torch", "transformers", "grpcio")
        },
        device=args.cluster.device,
        collective=driver.collective,
        max_sequences=args.cluster.max_sequences,
        max_step_tokens=args.cluster.max_step_tokens,
        started_at=time.time(),
    )


def serve_local() -> None:
    """The process that `deploy.local` starts: the application on a Ray of its own, loopback only.

    The first line on stdin is a `LocalRun`; the next one, or the end of stdin, says that it is time
    to stop, be it that the parent asks for it or is dead. Its words go to the start report.
    """
    run = LocalRun.model_validate_json(sys.stdin.readline())
    stop, abandoned = threading.Event(), threading.Event()
    threading.Thread(target=_await_end, args=(stop, abandoned), daemon=True).start()
    try:
        _start(run, stop)
        stop.wait()
        # Whatever does not end in order is killed by the parent, or below.
        with contextlib.suppress(Exception):
            handle = serve.get_app_handle(APPLICATION)
            handle.stop.remote().result(timeout_s=run.args.server.drain_timeout_s + _CALL_SECONDS)
    finally:
        if abandoned.is_set():
            ray.shutdown()
            shutil.rmtree(run.directory, ignore_errors=True)
    # Ray takes seconds to shut down, and its processes have nothing left to keep: the kernel ends
    # them with this one, and the parent sees to the rest.
    os._exit(0)


def _await_end(stop: threading.Event, abandoned: threading.Event) -> None:
    if not sys.stdin.readline():
        abandoned.set()
    stop.set()


def _start(run: LocalRun, stop: threading.Event) -> None:
    try:
        report(Progress(phase="starting Ray"))
        LocalRay(local_cpus(run.args.cluster, besides=REPLICA_CPUS), run.directory)
        require_gpus(run.args.cluster, int(ray.cluster_resources().get("GPU", 0)))
        report(Progress(phase="starting Ray Serve"))
        serve.start(proxy_location="Disabled")
        _deploy(run.args, stop)
    except Exception as error:
        report(failure(error))
        raise


def _deploy(args: AppArgs, stop: threading.Event) -> None:
    """Returns when the replica runs, or when told to stop; the replica reports its own failures."""
    serve.run_many(
        [RunTarget(target=build(args), name=APPLICATION, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    while not stop.wait(_POLL_SECONDS):
        status = serve.status().applications.get(APPLICATION)
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(status.message)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            handle = serve.get_app_handle(APPLICATION)
            report(handle.info.remote().result(timeout_s=_CALL_SECONDS))
            return
