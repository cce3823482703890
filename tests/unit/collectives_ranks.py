"""Runs one function on every rank of a group: on threads, or in processes that outlive the call."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from shards.collectives.base import Collective
from shards.collectives.gloo import Gloo
from shards.collectives.local import ThreadGroup
from shards.collectives.rendezvous import host_store
from shards.collectives.segment import abort_segment, create_segment
from shards.collectives.shared_memory import SharedMemory, warm_up

Case = Callable[[Collective], Any]
SLOT_BYTES = 4096  # small, so that modest tensors travel in many pieces


def answer(case: Case, collective: Collective) -> Any:
    """The case's result, or the exception it raised."""
    try:
        return case(collective)
    except Exception as error:
        return error


class Threads:
    """`ThreadGroup`, and `SharedMemory` with all ranks in this process."""

    def __init__(self, transport: str) -> None:
        self.transport = transport

    def __call__(
        self, case: Case, world: int, deadline_s: float = 20.0, abort: bool = False
    ) -> list[Any]:
        group: Sequence[Collective]
        segment = create_segment(world, SLOT_BYTES)
        if self.transport == "shared_memory":
            group = [SharedMemory(segment, rank, world, deadline_s) for rank in range(world)]
        else:
            threads_group = ThreadGroup(world, deadline_s)
            group = [threads_group[rank] for rank in range(world)]
        results: list[Any] = [None] * world

        def run(rank: int) -> None:
            results[rank] = answer(case, group[rank])

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        if abort:
            group[0].abort()
        for thread in threads:
            thread.join()
        for collective in group:
            collective.close()
        os.close(segment)
        return results


class Processes:
    """Workers that join a new group per call; a dead one is replaced at the next call."""

    def __init__(self, transport: str, workers: Workers) -> None:
        self.transport = transport
        self._workers = workers

    def __call__(
        self, case: Case, world: int, deadline_s: float = 20.0, abort: bool = False
    ) -> list[Any]:
        workers = self._workers.take(world)
        epoch = self._workers.next_epoch()
        segment = create_segment(world, SLOT_BYTES)
        for rank, (connection, process) in enumerate(workers):
            connection.send(
                (case, self.transport, epoch, self._workers.address, rank, world, deadline_s)
            )
            reduction.send_handle(connection, segment, process.pid)
        if abort and self.transport == "shared_memory":
            abort_segment(segment)
        results = [_receive(connection) for connection, _ in workers]
        for connection, process in workers:
            if process.is_alive():
                connection.send("close")
        os.close(segment)
        return results


class Workers:
    """The processes, started when first needed, and the store of their gloo groups."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []
        self._store, self.address = host_store("127.0.0.1")
        self._epoch = 0
        warm_up()  # into the cache, for the workers

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def take(self, world: int) -> list[tuple[Any, Any]]:
        self._workers = [worker for worker in self._workers if worker[1].is_alive()]
        started = []
        while len(self._workers) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((here, process))
            started.append(here)
        for connection in started:
            connection.recv()  # ready: imports would count against a group's deadline
        return self._workers[:world]

    def close(self) -> list[int]:
        """Exit codes of those that were not killed."""
        for connection, process in self._workers:
            connection.close()
            process.join()
        return [process.exitcode for _, process in self._workers]


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return "dead"


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    warm_up()
    connection.send("ready")
    while True:
        try:
            case, transport, epoch, address, rank, world, deadline_s = connection.recv()
        except EOFError:
            return
        segment = reduction.recv_handle(connection)
        collective: Collective
        if transport == "shared_memory":
            collective = SharedMemory(segment, rank, world, deadline_s)
        else:
            collective = Gloo(address, epoch, rank, world, deadline_s)
        os.close(segment)
        connection.send(answer(case, collective))
        connection.recv()  # the others may still need this rank's connections
        collective.close()
