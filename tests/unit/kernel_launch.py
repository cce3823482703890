"""Runs the instructions of CPU kernels, each thread's share in turn."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from shards.kernels.cpu.kernel import Header, Instruction

_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)


def launch(instructions: Iterable[Instruction], threads: int = 1, **header: int) -> None:
    """`header`: fields of the step's header, by name in small letters."""
    step = np.zeros(len(Header), np.int64)
    for name, value in header.items():
        step[Header[name.upper()]] = value
    for instruction in instructions:
        operands = np.array(instruction.operands, np.int64)
        kernel = _KERNEL(instruction.kernel.address)
        for thread in range(threads):
            assert kernel(operands.ctypes.data, step.ctypes.data, thread, threads) == 0
