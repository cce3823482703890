"""The Ray Serve application: one deployment, whose replicas each are an edge and a driver.

`deploy.app:build` is what a Serve config file names, once for each model. Serve places, starts,
scales and rolls out; tokens travel through each replica's own gRPC server.
"""

# Serve looks at the builder's annotation itself: no postponed annotations in this file.

import contextlib
import os
import shutil
import sys
import threading
from typing import Any

import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus

from cluster.shard_group import LocalRay, bundles, local_cpus
from deploy.args import AppArgs, LocalRun
from deploy.preflight import require_gpus
from deploy.replica import Replica
from deploy.start_report import Progress, failure, report

APPLICATION = "headwise"

# The edge's and the driver's own share of a machine, besides their ranks'.
REPLICA_CPUS = 1
_POLL_SECONDS = 0.1
_CALL_SECONDS = 5
# Asking costs next to nothing; a replica that says no three times in a row is replaced.
_HEALTH_SECONDS = 2
# Serve kills a replica that takes longer to end than its drain and this.
_END_SECONDS = 10


def build(args: AppArgs) -> serve.Application:
    """The application for `args`, in a fleet with all others of the Ray cluster."""
    return _application(args.in_fleet(), alone=False)


def _application(args: AppArgs, *, alone: bool) -> serve.Application:
    """The first bundle of a replica is its own, one more for each rank."""
    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if args.autoscaling is not None:
        scaling = {"autoscaling_config": args.autoscaling.for_serve()}
    deployment = serve.deployment(
        name=Replica.__name__,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=[{"CPU": REPLICA_CPUS}, *bundles(args.cluster)],
        placement_group_strategy=args.cluster.placement,
        max_surge_percent=args.max_surge_percent,
        rolling_update_percentage=args.rolling_update_percentage,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=args.server.drain_timeout_s + _END_SECONDS,
        **scaling,
    )
    application: serve.Application = deployment(Replica).bind(args, alone)
    return application


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
        [RunTarget(target=_application(args, alone=True), name=APPLICATION, route_prefix=None)],
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
