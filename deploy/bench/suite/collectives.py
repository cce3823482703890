"""`headwise bench collectives`: an all-reduce between ranks of this host, by size and transport.

Bandwidth is the bus bandwidth of NCCL's tests: 2 (n - 1) / n times the message over the time, which
a ring would move over each link, so that numbers of different n compare. The link between ranks of
one host is memory: what it carries at most is a plain copy of the message, measured alongside.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from deploy.bench.suite.environment import Environment
from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.result import Plot, Result, Series, Table, measurements_of
from shards.collectives import Transport

if TYPE_CHECKING:
    import torch

TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "gloo")
# From one element over a decode step's hidden states to those of a chunk of prefill.
SIZES = (1 << 2, 1 << 8, 1 << 10, 2304, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
_LARGE = 1 << 18
_DEADLINE_S = 60.0
_COPY = "memory copy"

Times = dict[tuple[str, int], list[float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """`calls` all-reduces of every size (bytes) and transport, in `rounds`; a tenth of that where
    messages are large. Raises `BenchmarkError` for a transport that CPUs have not, and for a single
    rank."""

    ranks: int
    transports: tuple[str, ...] = TRANSPORTS
    dtype: str = "float32"
    calls: int = 400
    rounds: int = 4
    sizes: tuple[int, ...] = SIZES

    def __post_init__(self) -> None:
        for name in self.transports:
            if name not in TRANSPORTS:
                raise BenchmarkError(f"--transports {name}: use {' or '.join(TRANSPORTS)}")
        if self.ranks < 2:
            raise BenchmarkError(f"--ranks {self.ranks}: an all-reduce takes at least 2")


def measure_collectives(sweep: Sweep) -> Result:
    """Seconds of each call on rank 0, and of plain copies of the same messages.

    Every round measures each transport once, so that a noisy machine disturbs them alike. Each rank
    is pinned to a core of its own while there are enough.
    """
    environment = Environment.here()
    times = _run(sweep)
    medians = {key: statistics.median(values) for key, values in times.items()}
    ranks, factor = sweep.ranks, 2 * (sweep.ranks - 1) / sweep.ranks
    x = tuple(float(size) for size in sweep.sizes)
    lines = [*((name, factor) for name in sweep.transports), (_COPY, 1.0)]
    return Result(
        benchmark="collectives",
        environment=environment,
        settings=asdict(sweep),
        measurements=measurements_of(times, ["transport", "bytes"], "all-reduce", "s"),
        tables=tuple(
            Table(
                title=f"All-reduce between {ranks} ranks over {name}, {sweep.dtype}",
                columns=("bytes", "p50 us", "p90 us", "bus GB/s", "share of a copy's"),
                rows=tuple(
                    (
                        size,
                        medians[name, size] * 1e6,
                        float(np.percentile(times[name, size], 90)) * 1e6,
                        factor * size / medians[name, size] / 1e9,
                        factor * medians[_COPY, size] / medians[name, size],
                    )
                    for size in sweep.sizes
                ),
            )
            for name in sweep.transports
        ),
        plots=(
            Plot(
                title=f"Latency of an all-reduce, {ranks} ranks",
                x_label="bytes",
                y_label="us",
                log_x=True,
                log_y=True,
                series=tuple(
                    Series(
                        label=name,
                        x=x,
                        y=tuple(medians[name, size] * 1e6 for size in sweep.sizes),
                        dashed=name == _COPY,
                    )
                    for name, _ in lines
                ),
            ),
            Plot(
                title=f"Bus bandwidth of an all-reduce, {ranks} ranks",
                x_label="bytes",
                y_label="GB/s",
                log_x=True,
                log_y=True,
                series=tuple(
                    Series(
                        label=name,
                        x=x,
                        y=tuple(each * size / medians[name, size] / 1e9 for size in sweep.sizes),
                        dashed=name == _COPY,
                    )
                    for name, each in lines
                ),
            ),
        ),
    )


def _run(sweep: Sweep) -> Times:
    """Rank 0's times."""
    from shards.collectives.rendezvous import host_store
    from shards.collectives.segment import create_segment

    store, rendezvous = host_store()
    segment = create_segment(sweep.ranks)
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for rank in range(sweep.ranks):
        here, there = context.Pipe()
        process = context.Process(target=_rank, args=(there, rank, sweep, rendezvous))
        process.start()
        there.close()
        reduction.send_handle(here, segment, process.pid)
        connections.append(here)
        processes.append(process)
    os.close(segment)
    try:
        times, *_ = [connection.recv() for connection in connections]
    except EOFError as error:
        raise BenchmarkError("a rank of the benchmark ended early: its error is above") from error
    finally:
        for process in processes:
            process.join()
        del store  # the ranks have left it
    return times


def _rank(connection: Connection, rank: int, sweep: Sweep, rendezvous: str) -> None:
    """One rank: sends the seconds of each of its calls, by transport and size."""
    import torch

    from shards.collectives import connect

    segment = reduction.recv_handle(connection)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    groups = {
        name: connect(
            name,
            rank=rank,
            world=sweep.ranks,
            epoch=1,
            deadline_s=_DEADLINE_S,
            rendezvous=rendezvous,
            segment=segment,
        )
        for name in TRANSPORTS
        if name in sweep.transports
    }
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    kind = getattr(torch, sweep.dtype)
    calls = max(1, sweep.calls // sweep.rounds)
    for size in sweep.sizes:
        x_N = torch.zeros(max(1, size // kind.itemsize), dtype=kind)
        each = max(3, calls // 10) if size > _LARGE else calls
        for _ in range(sweep.rounds):
            for name, group in groups.items():
                group.barrier()
                for _ in range(each):
                    began = time.perf_counter()
                    group.all_reduce(x_N)
                    times[name, size].append(time.perf_counter() - began)
            times[_COPY, size] += _copies(x_N, each)
    connection.send(dict(times))
    for group in groups.values():
        group.barrier()
        group.close()


def _copies(x_N: torch.Tensor, calls: int) -> list[float]:
    """Seconds of copying the message once: a link that is memory cannot be faster."""
    import torch

    y_N = torch.empty_like(x_N)
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        y_N.copy_(x_N)
        found.append(time.perf_counter() - began)
    return found
