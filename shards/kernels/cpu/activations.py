"""Activations of a feed-forward layer's channels, gated or not."""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import njit

from shards.kernels.base import Activation
from shards.kernels.cpu.elementary import normal_times, sigmoid_times
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import (
    LANES,
    fma,
    load,
    load_part,
    maximum,
    splat,
    store,
    store_part,
)

_NAMES: Final[tuple[Activation, ...]] = ("silu", "gelu", "gelu_tanh", "relu")
# GELU's tanh form, x (1 + tanh u) / 2 = x / (1 + e^-2u) with 2u = x (LINEAR + CUBIC x^2).
_LINEAR: Final = np.float32(2 * math.sqrt(2 / math.pi))
_CUBIC: Final = np.float32(2 * math.sqrt(2 / math.pi) * 0.044715)


class Operand(IntEnum):
    """Addresses, unless said otherwise."""

    GATE = 0  # float32 [rows, channels]
    UP = 1  # float32 [rows, channels]; 0: none
    BYTES = 2  # from row to row of both
    Y = 3  # float32 [rows, channels]
    Y_BYTES = 4  # from row to row
    CHANNELS = 5  # a number


def activate(activation: Activation, x: torch.Tensor) -> tuple[Instruction, ...]:
    """x[r] = act(x[r]) for the step's rows; float32 [max_rows, channels]."""
    return _instruction(activation, x, 0, x)


def activate_gated(
    activation: Activation, x: torch.Tensor, y: torch.Tensor
) -> tuple[Instruction, ...]:
    """y[r] = act(gate) * up, where x[r] = gate | up; float32 [max_rows, 2 x channels] to
    [max_rows, channels]."""
    if x.shape[1] != 2 * y.shape[1]:
        raise ValueError(f"gate and up of {y.shape[1]} channels in rows of {x.shape[1]}")
    return _instruction(activation, x, x.data_ptr() + 4 * y.shape[1], y)


def _instruction(
    activation: Activation, x: torch.Tensor, up: int, y: torch.Tensor
) -> tuple[Instruction, ...]:
    operands = {
        Operand.GATE: x.data_ptr(),
        Operand.UP: up,
        Operand.BYTES: 4 * x.stride(0),
        Operand.Y: y.data_ptr(),
        Operand.Y_BYTES: 4 * y.stride(0),
        Operand.CHANNELS: y.shape[1],
    }
    kernel = _kernel(_NAMES.index(activation))
    return (Instruction(kernel, tuple(operands[name] for name in Operand), (x, y)),)


@njit
def _activation(code: Any, x: Any) -> Any:
    if code == 0:
        return sigmoid_times(x, x)
    if code == 1:
        return normal_times(x)
    if code == 2:
        return sigmoid_times(x, x * fma(x * x, splat(_CUBIC), splat(_LINEAR)))
    return maximum(splat(np.float32(0)), x)


@cache
def _kernel(code: int) -> Kernel:
    """For the activation `_NAMES[code]`. Numba keeps closures over plain constants on disk."""

    def activated(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        up = operand(operands, Operand.UP)
        first, stop = share(operand(operands, Operand.CHANNELS), LANES, thread, threads)
        for row in range(operand(step, Header.ROWS)):
            skip = row * operand(operands, Operand.BYTES)
            gate = operand(operands, Operand.GATE) + skip
            y = operand(operands, Operand.Y) + row * operand(operands, Operand.Y_BYTES)
            for i in range(4 * first, 4 * (stop - LANES + 1), 4 * LANES):
                value = _activation(code, load(gate + i))
                store(y + i, value * load(up + skip + i) if up else value)
            rest = (stop - first) % LANES
            if rest:
                i = 4 * (stop - rest)
                value = _activation(code, load_part(gate + i, rest))
                if up:
                    value = value * load_part(up + skip + i, rest)
                store_part(y + i, value, rest)
        return 0

    return Kernel(activated)
