"""Measures this host's processor: how fast cores read memory and multiply matrices, together.

Every core is driven by a thread of its own, as ranks are, and the best of many rounds counts: a
busy machine is slower than it could be, never faster. Takes a few seconds, and imports torch.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numba
import numpy as np
import numpy.typing as npt
import psutil
import torch

from shards.cost.device import Arithmetic
from shards.cost.host import CoreRates, HostProfile, host_name

# Beyond any last-level cache: all cores' together, and each one's at least.
_STREAM_BYTES, _LEAST_STREAM_BYTES = 256 << 20, 32 << 20
# The shape of a chunk of prefill in a small model.
_ROWS, _WIDTH = 512, 1024
_ROUNDS = 20


def measure_host(rounds: int = _ROUNDS) -> HostProfile:
    """The profile of the cores that this process may run on, `rounds` of each measurement."""
    cores = sorted(os.sched_getaffinity(0))
    counts = sorted({min(1 << i, len(cores)) for i in range(len(cores).bit_length() + 1)})
    with _own_torch_threads():
        products = _products()
        stream_bytes = max(_STREAM_BYTES // len(cores), _LEAST_STREAM_BYTES)
        streams = [np.ones(stream_bytes // 8, np.uint64) for _ in cores]
        measured = tuple(
            _measure(cores[:count], streams[:count], products, rounds) for count in counts
        )
    return HostProfile(host_name(), psutil.virtual_memory().total, measured)


def _measure(
    cores: list[int],
    streams: list[npt.NDArray[np.uint64]],
    products: dict[Arithmetic, list[Callable[[], object]]],
    rounds: int,
) -> CoreRates:
    reading = _best_seconds(cores, [partial(_read, data) for data in streams], rounds)
    operations: dict[Arithmetic, float] = {}
    for kind, candidates in products.items():
        best = min(_best_seconds(cores, [run] * len(cores), rounds) for run in candidates)
        operations[kind] = len(cores) * 2 * _ROWS * _WIDTH**2 / best
    return CoreRates(len(cores), sum(data.nbytes for data in streams) / reading, operations)


@numba.njit(nogil=True)
def _read(words):  # type: ignore[no-untyped-def]
    """Reads every word once. Exclusive or is exact, so that the compiler may vectorise it."""
    folded = np.uint64(0)
    for i in range(words.size):
        folded ^= words[i]
    return folded


def _products() -> dict[Arithmetic, list[Callable[[], object]]]:
    """The ways of multiplying [_ROWS, _WIDTH] by [_WIDTH, _WIDTH] in each format; the fastest
    counts. Where a processor has no arithmetic of a format, widening to float32 is faster."""
    x = torch.randn(_ROWS, _WIDTH)
    weight = torch.randn(_WIDTH, _WIDTH)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    scale = torch.full((_WIDTH,), 1 / 32)
    with warnings.catch_warnings():
        # Deprecated, but what FBGEMM's int8 products take their weights from.
        warnings.simplefilter("ignore", UserWarning)
        codes = torch.quantize_per_channel(
            weight, scale, torch.zeros(_WIDTH, dtype=torch.int64), 0, torch.qint8
        )
    packed8 = torch.ops.quantized.linear_prepack(codes, None)
    packed16 = torch.ops.quantized.linear_prepack_fp16(weight, None)
    linear, quantized = torch.nn.functional.linear, torch.ops.quantized

    def float32() -> object:
        return linear(x, weight)

    return {
        "float32": [float32],
        "bfloat16": [float32, lambda: linear(x16, weight16)],
        "float16": [float32, lambda: quantized.linear_dynamic_fp16(x, packed16)],
        "int8": [float32, lambda: quantized.linear_dynamic(x, packed8)],
    }


def _best_seconds(cores: list[int], tasks: list[Callable[[], object]], rounds: int) -> float:
    """The shortest time in which every core has done its task, all at once."""
    together = threading.Barrier(len(cores))

    def work(core: int, task: Callable[[], object]) -> list[tuple[float, float]]:
        os.sched_setaffinity(0, {core})  # of this thread alone
        torch.set_num_threads(1)  # OpenMP keeps the number by thread
        task()  # compiles, and touches its memory
        times = []
        for _ in range(rounds):
            together.wait()
            began = time.perf_counter()
            task()
            times.append((began, time.perf_counter()))
        return times

    with ThreadPoolExecutor(len(cores)) as threads:
        by_core = list(threads.map(work, cores, tasks))
    # From the first core's beginning to the last one's end: a thread that was woken late has
    # measured less competition, not more speed.
    return min(
        max(end for _, end in times) - min(began for began, _ in times)
        for times in zip(*by_core, strict=True)
    )


@contextmanager
def _own_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
