"""Scaling and soft-capping of logits."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch

from shards.kernels.cpu.elementary import tanh
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import load_f32, load_part, splat, store_part


class Operand(IntEnum):
    """Addresses, unless said otherwise."""

    LOGITS = 0  # float32 [rows, width]
    BYTES = 1  # from row to row
    WIDTH = 2  # a number
    FACTORS = 3  # float32 [2]: the scale, the cap
    CAPPED = 4  # 1 where there is a cap


def shape_logits(
    logits: torch.Tensor, scale: float, softcap: float | None
) -> tuple[Instruction, ...]:
    """In place, for i < header[SAMPLED]: logits[i] *= scale; then c tanh(logits[i] / c) where there
    is a softcap c. float32 [.., vocabulary rows]."""
    factors = torch.tensor([scale, softcap or 0.0])
    operands = {
        Operand.LOGITS: logits.data_ptr(),
        Operand.BYTES: 4 * logits.stride(0),
        Operand.WIDTH: logits.shape[1],
        Operand.FACTORS: factors.data_ptr(),
        Operand.CAPPED: int(softcap is not None),
    }
    values = tuple(operands[name] for name in Operand)
    return (Instruction(_SHAPE, values, (logits, factors)),)


def _shape(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    scale = splat(load_f32(operand(operands, Operand.FACTORS)))
    cap = splat(load_f32(operand(operands, Operand.FACTORS) + 4))
    first, stop = share(operand(operands, Operand.WIDTH), LANES, thread, threads)
    for row in range(operand(step, Header.SAMPLED)):
        at = operand(operands, Operand.LOGITS) + row * operand(operands, Operand.BYTES)
        for i in range(first, stop, LANES):
            count = min(LANES, stop - i)
            x = load_part(at + 4 * i, count) * scale
            if operand(operands, Operand.CAPPED):
                x = cap * tanh(x / cap)
            store_part(at + 4 * i, x, count)
    return 0


_SHAPE = Kernel(_shape)
