"""The ranks of one model copy as Ray actors: placed, started, watched, ended.

Ray does just that: plans and results travel over `cluster/links.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.config import ClusterConfig
from cluster.errors import StartupError
from cluster.links import RankLinks
from cluster.rank_group import Placement
from shards.actor import ShardActor, end_process
from shards.config import ShardConfig
from shards.contract import Hello

_PLACEMENT_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 1.0
# Nothing of ours goes through Ray's object store; this is close to Ray's minimum.
_OBJECT_STORE_BYTES = 100 << 20


class LocalRay:
    """A Ray of this process's own, on loopback, gone without a trace at `stop`.

    Ray's sockets and logs go below `directory`, which is the caller's to remove. Does nothing where
    the process is connected to a Ray already. `prepare_local_ray` comes before importing this.
    """

    def __init__(self, cpus: int, directory: str | None = None) -> None:
        self._own_directory: str | None = None
        self._started = not ray.is_initialized()
        if not self._started:
            return
        if directory is None:  # short: the paths of unix sockets are limited
            directory = self._own_directory = tempfile.mkdtemp(prefix="hw-")
        try:
            _start_ray(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="warning",
                _node_ip_address="127.0.0.1",
                # Not `directory` itself: Ray opens what it is given to every user of the machine.
                _temp_dir=os.path.join(directory, "ray"),
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if self._started:
            ray.shutdown()
            self._started = False
        if self._own_directory is not None:
            shutil.rmtree(self._own_directory, ignore_errors=True)


def _start_ray(**options: Any) -> None:
    """`ray.init`, again where Ray was too slow for itself: it gives its own processes 30 s, always,
    which a first start on a busy machine may pass; the next finds their files in memory."""
    others = set(psutil.Process().children(recursive=True))
    for last_try in (False, False, True):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if last_try or "timed out during startup" not in str(error):
                raise
            for process in set(psutil.Process().children(recursive=True)) - others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def bundles(config: ClusterConfig) -> list[dict[str, float]]:
    """What each rank asks of Ray."""
    needs: dict[str, float] = {"CPU": config.cpus_per_rank}
    if config.device == "cuda":
        needs["GPU"] = 1
    return [dict(needs) for _ in range(config.tensor_parallel)]


def local_cpus(config: ClusterConfig, besides: int = 0) -> int:
    """How many CPUs a local Ray should offer: this machine's, or more where ranks of one CPU
    outnumber them, since ranks on shared cores are slow but right. Raises `StartupError` where a
    rank explicitly asks for several CPUs that are not there."""
    cores = os.cpu_count() or 1
    wanted = config.tensor_parallel * config.cpus_per_rank
    if config.cpus_per_rank > 1 and wanted > cores:
        raise StartupError(
            f"{config.tensor_parallel} ranks of {config.cpus_per_rank:g} CPUs need {wanted:g} CPUs "
            f"and this machine has {cores}: use fewer ranks or a smaller --cpus-per-rank"
        )
    return max(cores, int(-(-wanted // 1)) + besides)


class RayLauncher:
    """Ranks in bundles `first_bundle ..` of `group`, or in a placement group of their own."""

    def __init__(
        self,
        config: ClusterConfig,
        group: PlacementGroup | None = None,
        first_bundle: int = 0,
    ) -> None:
        self._config = config
        self._given = group
        self._own: PlacementGroup | None = None
        self._first_bundle = first_bundle
        self._nodes: tuple[str, ...] = ()
        self._actors: dict[int, Any] = {}
        self._runs: dict[int, ray.ObjectRef[None]] = {}
        self._deaths: dict[int, str] = {}
        self._noting = threading.Lock()
        self._watchers: list[threading.Thread] = []
        self._links: RankLinks | None = None

    def place(self) -> Placement:
        """Raises `StartupError` where the cluster cannot hold the ranks."""
        group = self._given or self._reserve()
        here = ray.get_runtime_context().get_node_id()
        table = ray.util.placement_group_table(group)["bundles_to_node_id"]
        ranks = range(self._config.tensor_parallel)
        nodes = tuple(table[self._first_bundle + rank] for rank in ranks)
        self._nodes = nodes
        if all(node == here for node in nodes):
            return Placement(nodes, listen=None)
        return Placement(nodes, listen=ray.util.get_node_ip_address())

    def launch(self, shards: Sequence[ShardConfig], links: RankLinks) -> None:
        self._links = links
        for shard in shards:
            self._start(shard, links)

    def replace(self, shard: ShardConfig, links: RankLinks, process: Hello | None) -> None:
        rank = shard.rank
        with self._noting:  # whatever becomes of it is no news any more
            del self._runs[rank]
            noticed = self._deaths.pop(rank, None)
        ray.kill(self._actors.pop(rank))
        if process is not None:  # ray.kill leaves a stopped process alive, and its CPUs taken
            if process.host == socket.gethostname():
                end_process(process.pid)
            elif noticed is None:
                on_its_node = NodeAffinitySchedulingStrategy(self._nodes[rank], soft=False)
                ray.remote(end_process).options(num_cpus=0, scheduling_strategy=on_its_node).remote(
                    process.pid
                )
        self._start(shard, links)

    def _start(self, shard: ShardConfig, links: RankLinks) -> None:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._given or self._own,
            placement_group_bundle_index=self._first_bundle + shard.rank,
        )
        actor = ShardActor.options(  # type: ignore[attr-defined] # ray.remote made it
            num_cpus=self._config.cpus_per_rank,
            num_gpus=1 if self._config.device == "cuda" else 0,
            scheduling_strategy=strategy,
        ).remote(shard)
        run = actor.run.remote(links.address, links.token)
        self._actors[shard.rank], self._runs[shard.rank] = actor, run
        watcher = threading.Thread(
            target=self._watch, args=(shard.rank, run, links), name="headwise-watch", daemon=True
        )
        self._watchers = [other for other in self._watchers if other.is_alive()] + [watcher]
        watcher.start()

    def deaths(self) -> dict[int, str]:
        return dict(self._deaths)

    def stop(self, grace_s: float) -> None:
        if self._runs:
            ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=grace_s)
        processes = self._local_processes()
        for actor in self._actors.values():
            ray.kill(actor)
        for process in psutil.wait_procs(processes, _KILL_TIMEOUT_S)[1]:
            process.kill()  # ray.kill leaves a stopped process alive
        for watcher in self._watchers:
            watcher.join(grace_s)
        self._actors, self._runs, self._watchers = {}, {}, []
        if self._own is not None:
            remove_placement_group(self._own)
            self._own = None

    def _reserve(self) -> PlacementGroup:
        config = self._config
        wanted = bundles(config)
        have = ray.cluster_resources()
        for resource in wanted[0]:
            need = sum(bundle[resource] for bundle in wanted)
            if need > have.get(resource, 0):
                raise StartupError(
                    f"{len(wanted)} ranks need {need:g} {resource}s and the Ray cluster has "
                    f"{have.get(resource, 0):g}: use fewer ranks, or add nodes"
                )
        self._own = placement_group(wanted, strategy=config.placement)
        if not self._own.wait(_PLACEMENT_TIMEOUT_S):
            remove_placement_group(self._own)
            self._own = None
            raise StartupError(
                f"Ray found no place for {len(wanted)} ranks ({config.placement}) within "
                f"{_PLACEMENT_TIMEOUT_S:g} s: the CPUs or GPUs are taken, or no single node has "
                "enough of them (placement SPREAD or PACK allows several nodes)"
            )
        return self._own

    def _watch(self, rank: int, run: ray.ObjectRef[None], links: RankLinks) -> None:
        """A run's end is its rank's death notice, also where no socket tells (a lost node)."""
        cause = _cause(run)
        with self._noting:
            if self._runs.get(rank) is not run:
                return
            self._deaths[rank] = cause
        with contextlib.suppress(OSError):
            links.wake()

    def _local_processes(self) -> list[psutil.Process]:
        """The ranks' processes on this host."""
        processes = []
        for rank in range(0 if self._links is None else self._links.world):
            hello = self._links.hello(rank) if self._links is not None else None
            if hello is not None and hello.host == socket.gethostname():
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes.append(psutil.Process(hello.pid))
        return processes


def _cause(run: ray.ObjectRef[None]) -> str:
    try:
        ray.get(run)
    except RayTaskError as error:
        return f"it failed: {error.cause}"
    except OutOfMemoryError:
        return "Ray killed it because its node was running out of memory"
    except RayError as error:
        return f"its process ended: {str(error).strip().splitlines()[0]}"
    return "it left"
