"""A replica of the Serve application: a driver with its ranks, and the edge of the fleet there."""

# Serve looks at annotations itself: none of them is postponed in this file.

import asyncio
import contextlib
import importlib.metadata
import secrets
import time

import ray
import structlog
from ray import serve

from cluster.blueprint import draw_up
from cluster.driver import Driver
from cluster.request import HealthState
from cluster.shard_group import RayLauncher
from deploy.args import AppArgs
from deploy.autoscaling import KV_USE, ONGOING
from deploy.edge.models import Models, ServerFacts
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from deploy.fleet.directory import SoftDirectory
from deploy.fleet.fleet import Fleet, Local
from deploy.fleet.link_server import LinkServer
from deploy.fleet.ray_directory import RayDirectory
from deploy.fleet.wire import NONCE_BYTES
from deploy.start_report import Progress, Ready, failure, report
from deploy.telemetry.logs import configure_logging
from deploy.telemetry.telemetry import Telemetry
from deploy.version import version

# How long a new replica waits for the others to know of it: a dead one never will.
_ROUTED_SECONDS = 5.0
# Of the drain: for connections to move to other edges. The rest is for what they began last.
_RETIRING_SHARE = 0.75

log = structlog.get_logger(__name__)


class Replica:
    """A driver with its ranks, and an edge that answers for every replica of the fleet.

    `alone`: there is no fleet but this one.
    """

    async def __init__(self, args: AppArgs, alone: bool) -> None:  # type: ignore[misc] # Serve awaits it
        """Up when the ranks hold their weights, the port is bound and the others send requests
        here, so that Serve does not retire an old replica before its successor can answer."""
        configure_logging(args.log_format, args.log_level)
        self._drain_timeout_s = args.server.drain_timeout_s
        self._driver: Driver | None = None
        self._fleet: Fleet | None = None
        self._links: LinkServer | None = None
        self._edge: Edge | None = None
        self._telemetry: Telemetry | None = None
        self._stopping: asyncio.Task[None] | None = None
        try:
            driver = self._driver = Driver(await asyncio.to_thread(draw_up, args.cluster))
            group = ray.util.get_current_placement_group()
            launcher = RayLauncher(args.cluster, group, first_bundle=1)
            await asyncio.to_thread(driver.start, launcher, _report_progress)
            models, facts = Models(), _facts(args, driver)
            context = serve.get_replica_context()
            local = Local(
                f"{context.app_name}/{context.replica_tag}",
                args.version,
                time.time(),
                driver,
                Texts(driver.codec, driver.model),
                facts,
            )
            directory = SoftDirectory() if alone else RayDirectory()
            fleet = self._fleet = Fleet(directory, models, local)
            telemetry = self._telemetry = Telemetry(driver, args.server)
            edge = Edge(
                models,
                args.server,
                telemetry.watchers,
                exposition=telemetry.exposition,
                on_call=telemetry.metrics.count_call,
                share_port=not alone,
            )
            await fleet.start()
            await edge.start()
            self._edge = edge
            telemetry.start(edge)
            if not alone:
                await self._join(fleet, driver, facts)
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
            http=self._edge.http_address,
            model=self._driver.model,
            ranks=self._driver.ranks,
            kv_tokens=load.kv_blocks * load.block_size,
        )

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here again and again."""
        assert self._driver is not None
        health = self._driver.health()
        if health.state is HealthState.NOT_READY:
            raise RuntimeError(health.cause)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for `deploy.autoscaling.Policy`."""
        assert self._driver is not None
        load = self._driver.load()
        kv = load.kv_blocks_used / load.kv_blocks if load.kv_blocks else 0.0
        return {ONGOING: float(load.running + load.waiting), KV_USE: kv}

    async def stop(self) -> None:
        """Hand over to the others, finish what runs, end the ranks; idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        """Every part, also where another one fails: the ranks last, whatever happens."""
        deadline = time.monotonic() + self._drain_timeout_s

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        async with contextlib.AsyncExitStack() as parts:
            if self._driver is not None:
                parts.push_async_callback(asyncio.to_thread, self._driver.stop)
            if self._telemetry is not None:
                parts.push_async_callback(self._telemetry.stop)
            if self._fleet is not None:
                parts.push_async_callback(self._fleet.close)
            if self._links is not None:
                parts.push_async_callback(self._links.close)
            handed_over = False
            if self._fleet is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left()):
                        handed_over = await self._fleet.retire()
            if self._links is not None:
                self._links.retire()
            if self._edge is not None:
                if handed_over:
                    # What comes until connections have made way needs time to end, too.
                    await self._edge.retire(left() * _RETIRING_SHARE)
                await self._edge.stop(left())
            if self._links is not None:
                await self._links.drained(left())

    async def __del__(self) -> None:
        """What Serve calls when it retires a replica."""
        await self.stop()

    async def _join(self, fleet: Fleet, driver: Driver, facts: ServerFacts) -> None:
        """Let the others link to this replica, and wait until they have."""
        key = secrets.token_bytes(NONCE_BYTES)
        links = self._links = LinkServer(driver, driver.codec, facts, key)
        others = await fleet.announce(await links.start(ray.util.get_node_ip_address()), key)
        try:
            await asyncio.wait_for(links.routed_by(others), _ROUTED_SECONDS)
        except TimeoutError:
            log.warning("not every replica knows of this one yet", replicas=others)


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
