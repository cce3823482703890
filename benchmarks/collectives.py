"""Latency of an all-reduce between ranks of this host, by transport and size, side by side.

    python -m benchmarks.collectives [--world 2] [--calls 200] [--dtype float32] [--json]

Every round measures each transport once, so that a noisy machine disturbs them alike; trust the
ratios. Each rank is pinned to a core of its own while there are enough.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch

from shards.collectives import Transport, connect
from shards.collectives.rendezvous import host_store
from shards.collectives.segment import create_segment

SIZES = (1, 576, 4096, 65536, 512 * 576, 1 << 20)
TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "gloo")
ROUNDS = 4


def measure(
    connection: Connection, rank: int, world: int, rendezvous: str, dtype_name: str, calls: int
) -> None:
    """One rank: sends, per (transport, size), the microseconds of each of its calls."""
    segment = reduction.recv_handle(connection)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    groups = {
        name: connect(
            name,
            rank=rank,
            world=world,
            epoch=1,
            deadline_s=60,
            rendezvous=rendezvous,
            segment=segment,
        )
        for name in TRANSPORTS
    }
    times: dict[tuple[str, int], list[float]] = {}
    for size in SIZES:
        x = torch.zeros(size, dtype=getattr(torch, dtype_name))
        for _ in range(ROUNDS):
            for name, group in groups.items():
                group.barrier()
                for _ in range(max(5, calls // ROUNDS // (10 if size > 100_000 else 1))):
                    began = time.perf_counter()
                    group.all_reduce(x)
                    taken = (time.perf_counter() - began) * 1e6
                    times.setdefault((name, size), []).append(taken)
    connection.send(times)
    for group in groups.values():
        group.barrier()
        group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of an all-reduce, by transport.")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    _store, rendezvous = host_store()
    segment = create_segment(arguments.world)
    context = mp.get_context("spawn")
    connections = []
    for rank in range(arguments.world):
        here, there = context.Pipe()
        process = context.Process(
            target=measure,
            args=(there, rank, arguments.world, rendezvous, arguments.dtype, arguments.calls),
        )
        process.start()
        there.close()
        reduction.send_handle(here, segment, process.pid)
        connections.append(here)
    os.close(segment)
    times, *_ = [connection.recv() for connection in connections]

    rows = []
    for size in SIZES:
        row: dict[str, float] = {"elements": size}
        for name in TRANSPORTS:
            sample = sorted(times[name, size])
            row[f"{name}_p50_us"] = round(statistics.median(sample), 1)
            row[f"{name}_p90_us"] = round(sample[len(sample) * 9 // 10], 1)
        row["ratio"] = round(row["gloo_p50_us"] / row["shared_memory_p50_us"], 1)
        rows.append(row)
    if arguments.json:
        print(json.dumps({"world": arguments.world, "dtype": arguments.dtype, "rows": rows}))
        return
    print("  ".join(f"{name:>20}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>20}" for value in row.values()))


if __name__ == "__main__":
    main()
