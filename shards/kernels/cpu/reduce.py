"""The shared-memory all-reduce as an instruction, so that a step need not leave compiled code."""

from __future__ import annotations

from typing import Any

import torch

from shards.collectives import kernel as collective
from shards.collectives.shared_memory import SharedMemory
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand
from shards.kernels.cpu.simd import load_i64


def _all_reduce(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    """Operands: the group's state, x, width of a row."""
    if thread != 0:
        return 0
    count = load_i64(step + 8 * Header.ROWS) * operand(operands, 2)
    state, x = operand(operands, 0), operand(operands, 1)
    return collective.all_reduce(state, x, count, 4, collective.FLOAT32)


_ALL_REDUCE = Kernel(_all_reduce)


def all_reduce(group: SharedMemory, x_TD: torch.Tensor) -> tuple[Instruction, ...]:
    """Sum the step's rows of `x_TD` float32 [rows, D] over the ranks, in place."""
    operands = (group.state_address, x_TD.data_ptr(), x_TD.shape[1])
    return (Instruction(_ALL_REDUCE, operands, (group, x_TD)),)
