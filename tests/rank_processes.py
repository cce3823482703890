"""Ranks in processes of their own, without Ray: to be killed, stopped and replaced in seconds."""

from __future__ import annotations

import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

from cluster.links import RankLinks
from cluster.rank_group import Placement
from shards.config import ShardConfig
from shards.contract import Hello

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["shards.worker", "shards.collectives.shared_memory"])


def serve(shard: ShardConfig, address: str, token: str) -> None:
    from shards import worker

    worker.serve(shard, address, token)


class ProcessLauncher:
    """A `cluster.rank_group.Launcher`. `started` are the pids of all ranks ever, in order.

    `listen` has the ranks connect over TCP, as from another host, and thus use gloo.
    """

    def __init__(self, world: int, listen: str | None = None) -> None:
        self._world = world
        self._listen = listen
        self._processes: dict[int, BaseProcess] = {}
        self._deaths: dict[int, str] = {}
        self.started: list[int] = []

    def place(self) -> Placement:
        return Placement(("here",) * self._world, self._listen)

    def launch(self, shards: Sequence[ShardConfig], links: RankLinks) -> None:
        for shard in shards:
            self._start(shard, links)

    def replace(self, shard: ShardConfig, links: RankLinks, process: Hello | None) -> None:
        old = self._processes.pop(shard.rank)
        old.kill()
        old.join()
        self._deaths.pop(shard.rank, None)
        self._start(shard, links)

    def deaths(self) -> dict[int, str]:
        return dict(self._deaths)

    def stop(self, grace_s: float) -> None:
        for process in self._processes.values():
            process.join(grace_s)
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid(rank), number)

    def _start(self, shard: ShardConfig, links: RankLinks) -> None:
        process = _CONTEXT.Process(target=serve, args=(shard, links.address, links.token))
        process.daemon = True
        self._processes[shard.rank] = process
        process.start()
        assert process.pid is not None
        self.started.append(process.pid)
        threading.Thread(
            target=self._watch, args=(shard.rank, process, links), name="watch", daemon=True
        ).start()

    def _watch(self, rank: int, process: BaseProcess, links: RankLinks) -> None:
        mp.connection.wait([process.sentinel])
        if self._processes.get(rank) is process:
            self._deaths[rank] = "its process ended"
            with suppress(OSError):
                links.wake()
