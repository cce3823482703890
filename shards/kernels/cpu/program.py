"""A recorded list of instructions, run by one compiled call per thread.

What a CUDA graph is to a GPU: recorded once for an epoch, replayed with other numbers in the step's
header and buffers. Between two instructions the threads of a rank wait for each other; what cannot
be compiled (a collective over the network) stands between two runs of instructions as a Python
call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from shards.collectives.kernel_parts import load_acquire, store_release
from shards.kernels.cpu.barrier import counts, meet
from shards.kernels.cpu.emission import I32, I64
from shards.kernels.cpu.kernel import Header, Instruction, call
from shards.kernels.cpu.simd import load_i64, store_i64
from shards.timing import PHASES, Phase, PhaseTimer

# Of a program's table, int64 per instruction: kernel, operands, phase.
_FIELDS = 3
_CLOCK_MONOTONIC = 1


@intrinsic
def _now(_context: Any) -> Any:
    """Nanoseconds."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        clock = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        signature = ir.FunctionType(I32, [I32, clock.type])
        function = cgutils.get_or_insert_function(builder.module, signature, "clock_gettime")
        builder.call(function, [I32(_CLOCK_MONOTONIC), clock])
        parts = builder.load(clock)
        seconds, rest = (builder.extract_value(parts, i) for i in range(2))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.int64(), generate


@njit(nogil=True, cache=True)
def _run(
    table: Any,
    count: Any,
    step: Any,
    nanoseconds: Any,
    failure: Any,
    met: Any,
    thread: Any,
    threads: Any,
) -> Any:
    """Run `count` instructions; returns 0 or the status of the one that ended it.

    Thread 0 adds up the nanoseconds of each phase. `failure` is a status that threads share, `met`
    where they meet (`barrier.counts`).
    """
    began = _now()
    for i in range(count):
        entry = table + 24 * i
        status = call(load_i64(entry), load_i64(entry + 8), step, thread, threads)
        if threads > 1:
            if status != 0:
                store_release(failure, status)
            meet(met, thread, threads)
            status = load_acquire(failure)
        if status != 0:
            return status
        phase = load_i64(entry + 16)
        if thread == 0 and (i + 1 == count or load_i64(entry + 40) != phase):
            now = _now()
            at = nanoseconds + 8 * phase
            store_i64(at, load_i64(at) + now - began)
            began = now
    return 0


Step = Instruction | Callable[[int], None]
_Call = tuple[Phase, Callable[[int], None]]


class Program:
    """Instructions, and Python calls of (rows of the step), each with the phase it counts as.

    `header` is filled before each run. `check` raises what a status other than 0 stands for.
    """

    def __init__(
        self,
        steps: Sequence[tuple[Phase, Step]],
        threads: int,
        check: Callable[[int], None],
    ) -> None:
        self.header = np.zeros(len(Header), np.int64)
        self._check = check
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._failure = np.zeros(1, np.int64)
        self._met = counts(threads)
        self._nanoseconds = np.zeros(len(PHASES), np.int64)
        self._parts = _parts(steps)

    def run(self, timer: PhaseTimer) -> None:
        """Raises what `check` and the Python calls raise."""
        for part in self._parts:
            if isinstance(part, _Stretch):
                self._check(self._execute(part))
            else:
                phase, function = part
                began = time.perf_counter()
                function(int(self.header[Header.ROWS]))
                timer.credit(phase, time.perf_counter() - began)
        for phase, spent in zip(PHASES, self._nanoseconds.tolist(), strict=True):
            if spent:
                timer.credit(phase, spent * 1e-9)
        self._nanoseconds[:] = 0

    def _execute(self, stretch: _Stretch) -> int:
        arguments = (
            stretch.table.ctypes.data,
            len(stretch.table),
            self.header.ctypes.data,
            self._nanoseconds.ctypes.data,
            self._failure.ctypes.data,
            self._met.ctypes.data,
        )
        if self._pool is None:
            return _run(*arguments, 0, 1)
        others = [
            self._pool.submit(partial(_run, *arguments, thread, self._threads))
            for thread in range(1, self._threads)
        ]
        status = _run(*arguments, 0, self._threads)
        for other in others:
            other.result()
        return status


class _Stretch:
    """Instructions without a Python call between them."""

    def __init__(self, steps: Sequence[tuple[Phase, Instruction]]) -> None:
        self._keeps = tuple(steps)
        self._operands = [np.array(step.operands, np.int64) for _, step in steps]
        self.table = np.array(
            [
                (step.kernel.address, operands.ctypes.data, PHASES.index(phase))
                for (phase, step), operands in zip(steps, self._operands, strict=True)
            ],
            np.int64,
        )


def _parts(steps: Sequence[tuple[Phase, Step]]) -> list[_Stretch | _Call]:
    parts: list[_Stretch | _Call] = []
    stretch: list[tuple[Phase, Instruction]] = []
    for phase, step in steps:
        if isinstance(step, Instruction):
            stretch.append((phase, step))
            continue
        if stretch:
            parts.append(_Stretch(stretch))
            stretch = []
        parts.append((phase, step))
    return [*parts, _Stretch(stretch)] if stretch else parts
