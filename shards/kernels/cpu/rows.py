"""Sums and copies of rows."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import numpy as np
import torch
from numba import njit

from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import (
    fma,
    fma_scalar,
    load,
    load_f32,
    load_i64,
    splat,
    store,
    store_f32,
)

_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)


class Operand(IntEnum):
    """Of all kernels here; addresses, unless said otherwise."""

    TARGET = 0  # float32 [rows, width]
    TARGET_BYTES = 1  # from row to row
    SOURCE = 2  # float32 [.., width]
    SOURCE_BYTES = 3  # from row to row
    WIDTH = 4  # a number
    INDICES = 5  # int64 [rows]
    OFFSET = 6  # added to each index
    BIAS = 7  # float32 [width]; 0: none
    FACTOR = 8  # float32 [1]: what the source, or the target of a scaling, is multiplied by


def add(
    x: torch.Tensor, y: torch.Tensor, *, bias: torch.Tensor | None = None, factor: float = 1.0
) -> tuple[Instruction, ...]:
    """x[r] += factor * y[r] (+ bias) for the step's rows; float32 [max_rows, width]."""
    bias = None if bias is None else bias.float().contiguous()
    return _instruction(_ADD, x, y, bias=bias, factor=factor)


def scale(x: torch.Tensor, factor: float) -> tuple[Instruction, ...]:
    """x[r] *= factor for the step's rows; float32 [max_rows, width]. A factor of 0 clears them."""
    return _instruction(_SCALE, x, x, factor=factor)


def add_positions(
    x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *, offset: int = 0
) -> tuple[Instruction, ...]:
    """x[r] += table[positions[r] + offset] for the step's rows.

    x: float32 [max_rows, width]; table: float32 [.., width]; positions: int64 [max_rows].
    """
    return _instruction(_ADD_ROWS_AT, x, table, indices=positions, offset=offset)


def gather_rows(x: torch.Tensor, indices: torch.Tensor, y: torch.Tensor) -> tuple[Instruction, ...]:
    """y[i] = x[indices[i]] for i < header[SAMPLED]; float32 [.., width], indices int64."""
    return _instruction(_GATHER, y, x, indices=indices)


def _instruction(
    kernel: Kernel,
    target: torch.Tensor,
    source: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    offset: int = 0,
    bias: torch.Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Instruction, ...]:
    factors = torch.tensor([factor])
    if target.dtype != torch.float32 or source.dtype != torch.float32:
        raise ValueError(f"rows of {target.dtype} and {source.dtype}: both must be float32")
    operands = {
        Operand.TARGET: target.data_ptr(),
        Operand.TARGET_BYTES: 4 * target.stride(0),
        Operand.SOURCE: source.data_ptr(),
        Operand.SOURCE_BYTES: 4 * source.stride(0),
        Operand.WIDTH: target.shape[1],
        Operand.INDICES: 0 if indices is None else indices.data_ptr(),
        Operand.OFFSET: offset,
        Operand.BIAS: 0 if bias is None else bias.data_ptr(),
        Operand.FACTOR: factors.data_ptr(),
    }
    keeps = (target, source, indices, bias, factors)
    return (Instruction(kernel, tuple(operands[name] for name in Operand), keeps),)


@njit
def _add_row(x: Any, y: Any, width: Any, factor: Any) -> None:
    whole = width // LANES * LANES
    for i in range(0, 4 * whole, 4 * LANES):
        store(x + i, fma(splat(factor), load(y + i), load(x + i)))
    for i in range(4 * whole, 4 * width, 4):
        store_f32(x + i, fma_scalar(factor, load_f32(y + i), load_f32(x + i)))


def _add(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    width, bias = operand(operands, Operand.WIDTH), operand(operands, Operand.BIAS)
    factor = load_f32(operand(operands, Operand.FACTOR))
    first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
    for row in range(first, stop):
        x = operand(operands, Operand.TARGET) + row * operand(operands, Operand.TARGET_BYTES)
        y = operand(operands, Operand.SOURCE) + row * operand(operands, Operand.SOURCE_BYTES)
        _add_row(x, y, width, factor)
        if bias:
            _add_row(x, bias, width, _ONE)
    return 0


def _add_rows_at(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
    for row in range(first, stop):
        at = load_i64(operand(operands, Operand.INDICES) + 8 * row)
        at += operand(operands, Operand.OFFSET)
        x = operand(operands, Operand.TARGET) + row * operand(operands, Operand.TARGET_BYTES)
        y = operand(operands, Operand.SOURCE) + at * operand(operands, Operand.SOURCE_BYTES)
        _add_row(x, y, operand(operands, Operand.WIDTH), _ONE)
    return 0


def _scale(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    factor = load_f32(operand(operands, Operand.FACTOR))
    first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
    for row in range(first, stop):
        x = operand(operands, Operand.TARGET) + row * operand(operands, Operand.TARGET_BYTES)
        for i in range(0, 4 * operand(operands, Operand.WIDTH), 4):
            # Not a product where rows are cleared: what they held may be no number.
            store_f32(x + i, load_f32(x + i) * factor if factor != _ZERO else _ZERO)
    return 0


def _gather(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    first, stop = share(operand(step, Header.SAMPLED), 1, thread, threads)
    for row in range(first, stop):
        at = load_i64(operand(operands, Operand.INDICES) + 8 * row)
        y = operand(operands, Operand.TARGET) + row * operand(operands, Operand.TARGET_BYTES)
        x = operand(operands, Operand.SOURCE) + at * operand(operands, Operand.SOURCE_BYTES)
        for i in range(0, 4 * operand(operands, Operand.WIDTH), 4):
            store_f32(y + i, load_f32(x + i))
    return 0


_ADD, _ADD_ROWS_AT = Kernel(_add), Kernel(_add_rows_at)
_SCALE, _GATHER = Kernel(_scale), Kernel(_gather)
