"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) of rows, or of the heads in them."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, Final

import numpy as np
import torch
from numba import njit

from shards.kernels.base import Norm
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import fma, load, load_f32, splat, store, store_f32, sum_lanes

_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)


class Operand(IntEnum):
    """Addresses, unless said otherwise."""

    X = 0  # float32 [rows, width]
    X_BYTES = 1  # from row to row
    Y = 2  # float32 [rows, width]
    Y_BYTES = 3  # from row to row
    WIDTH = 4  # a number
    WEIGHT = 5  # float32 [width]
    BIAS = 6  # float32 [width]; 0: none
    EPSILON = 7  # float32 [1]
    CENTRED = 8  # 1: LayerNorm, 0: RMSNorm
    ROWS = 9  # field of the header
    HEADS = 10  # a number: so many norms of WIDTH channels lie side by side in a row
    STEP = 11  # in bytes, from one head's weight and bias to the next one's; 0: they share them


def norm(
    norm: Norm, x: torch.Tensor, y: torch.Tensor, *, rows: Header = Header.ROWS
) -> tuple[Instruction, ...]:
    """y[r] = norm(x[r]) for r < header[rows]; float32 [max_rows, width], y may be x.

    Statistics are float32, of sums in a fixed order.
    """
    return _instruction(norm, x, y, rows, heads=1)


def norm_heads(norm: Norm, x: torch.Tensor, heads: int) -> tuple[Instruction, ...]:
    """Each of the `heads` side by side in x[r] normed by itself, in place, for the step's rows.

    x: float32 [max_rows, heads * head_dim]. The norm's weight and bias are [head_dim], or each
    head's own, [heads * head_dim].
    """
    return _instruction(norm, x, x, Header.ROWS, heads)


def _instruction(
    norm: Norm, x: torch.Tensor, y: torch.Tensor, rows: Header, heads: int
) -> tuple[Instruction, ...]:
    width = x.shape[1] // heads
    weight = norm.weight.float().contiguous()
    bias = None if norm.bias is None else norm.bias.float().contiguous()
    epsilon = torch.tensor([norm.eps])
    operands = {
        Operand.X: x.data_ptr(),
        Operand.X_BYTES: 4 * x.stride(0),
        Operand.Y: y.data_ptr(),
        Operand.Y_BYTES: 4 * y.stride(0),
        Operand.WIDTH: width,
        Operand.WEIGHT: weight.data_ptr(),
        Operand.BIAS: 0 if bias is None else bias.data_ptr(),
        Operand.EPSILON: epsilon.data_ptr(),
        Operand.CENTRED: int(norm.kind == "layer"),
        Operand.ROWS: rows,
        Operand.HEADS: heads,
        Operand.STEP: 0 if weight.numel() == width else 4 * width,
    }
    keeps = (x, y, weight, bias, epsilon)
    return (Instruction(_NORM, tuple(operands[name] for name in Operand), keeps),)


@njit
def _mean(x: Any, width: Any) -> Any:
    sums, whole = splat(_ZERO), width // LANES * LANES
    for i in range(0, whole, LANES):
        sums = sums + load(x + 4 * i)
    total = sum_lanes(sums)
    for i in range(whole, width):
        total += load_f32(x + 4 * i)
    return total / np.float32(width)


@njit
def _mean_square(x: Any, width: Any, mean: Any) -> Any:
    """Of the distance to `mean`."""
    sums, whole = splat(_ZERO), width // LANES * LANES
    for i in range(0, whole, LANES):
        distance = load(x + 4 * i) - splat(mean)
        sums = fma(distance, distance, sums)
    total = sum_lanes(sums)
    for i in range(whole, width):
        total += (load_f32(x + 4 * i) - mean) * (load_f32(x + 4 * i) - mean)
    return total / np.float32(width)


@njit
def _norm_one(operands: Any, x: Any, y: Any, weight: Any, bias: Any) -> None:
    width = operand(operands, Operand.WIDTH)
    epsilon = load_f32(operand(operands, Operand.EPSILON))
    whole = width // LANES * LANES
    mean = _mean(x, width) if operand(operands, Operand.CENTRED) else _ZERO
    scale = _ONE / np.float32(math.sqrt(_mean_square(x, width, mean) + epsilon))
    for i in range(0, whole, LANES):
        scaled = (load(x + 4 * i) - splat(mean)) * splat(scale) * load(weight + 4 * i)
        store(y + 4 * i, scaled + load(bias + 4 * i) if bias else scaled)
    for i in range(whole, width):
        at = 4 * i
        value = (load_f32(x + at) - mean) * scale * load_f32(weight + at)
        store_f32(y + at, value + load_f32(bias + at) if bias else value)


def _norm(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    heads, width = operand(operands, Operand.HEADS), operand(operands, Operand.WIDTH)
    weight, bias = operand(operands, Operand.WEIGHT), operand(operands, Operand.BIAS)
    rows = operand(step, operand(operands, Operand.ROWS))
    first, stop = share(rows, 1, thread, threads)
    for row in range(first, stop):
        x = operand(operands, Operand.X) + row * operand(operands, Operand.X_BYTES)
        y = operand(operands, Operand.Y) + row * operand(operands, Operand.Y_BYTES)
        for head in range(heads):
            at, skip = 4 * width * head, operand(operands, Operand.STEP) * head
            _norm_one(operands, x + at, y + at, weight + skip, bias + skip if bias else 0)
    return 0


_NORM = Kernel(_norm)
