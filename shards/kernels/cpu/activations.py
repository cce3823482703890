"""Activations of a feed-forward layer's channels, gated or not."""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import njit

from shards.kernels.base import Gating
from shards.kernels.cpu.elementary import normal_times, sigmoid_times
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import (
    fma,
    load,
    load_f32,
    load_part,
    maximum,
    splat,
    store,
    store_part,
)
from shards.models.spec import Activation

_NAMES: Final[tuple[Activation, ...]] = ("silu", "gelu", "gelu_tanh", "relu")
_CLAMPED: Final = len(_NAMES)
# GELU's tanh form, x (1 + tanh u) / 2 = x / (1 + e^-2u) with 2u = x (LINEAR + CUBIC x^2).
_LINEAR: Final = np.float32(2 * math.sqrt(2 / math.pi))
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_CUBIC: Final = np.float32(2 * math.sqrt(2 / math.pi) * 0.044715)


class Operand(IntEnum):
    """Addresses, unless said otherwise."""

    GATE = 0  # float32 [rows, channels]
    UP = 1  # float32 [rows, channels]; 0: none
    BYTES = 2  # from row to row of both
    Y = 3  # float32 [rows, channels]
    Y_BYTES = 4  # from row to row
    CHANNELS = 5  # a number
    FACTORS = 6  # float32 [2]: limit and alpha of a clamp
    TOKEN_GATES = 7  # float32 [rows]: the sigmoid of one weighs its row; 0: none


def activate(
    gating: Gating, x: torch.Tensor, y: torch.Tensor, *, token_gates: torch.Tensor | None = None
) -> tuple[Instruction, ...]:
    """y[r] = act(gate) * up, where x[r] = gate | up, for the step's rows; act(x[r]) where nothing
    is gated, and y may be x. Then times the sigmoid of token_gates[r].

    x: float32 [max_rows, 2 x channels], or [max_rows, channels]; y: [max_rows, channels];
    token_gates: [max_rows, 1].
    """
    channels = y.shape[1]
    if x.shape[1] != (2 if gating.gated else 1) * channels:
        parts = "gate and up" if gating.gated else "up"
        raise ValueError(f"{parts} of {channels} channels in rows of {x.shape[1]}")
    clamp = gating.clamp
    factors = torch.tensor([0.0, 0.0] if clamp is None else [clamp.limit, clamp.alpha])
    operands = {
        Operand.GATE: x.data_ptr(),
        Operand.UP: x.data_ptr() + 4 * channels if gating.gated else 0,
        Operand.BYTES: 4 * x.stride(0),
        Operand.Y: y.data_ptr(),
        Operand.Y_BYTES: 4 * y.stride(0),
        Operand.CHANNELS: channels,
        Operand.FACTORS: factors.data_ptr(),
        Operand.TOKEN_GATES: 0 if token_gates is None else token_gates.data_ptr(),
    }
    kernel = _kernel(_NAMES.index(gating.activation) if clamp is None else _CLAMPED)
    keeps = (x, y, factors, token_gates)
    return (Instruction(kernel, tuple(operands[name] for name in Operand), keeps),)


@njit
def _minimum(a: Any, b: Any) -> Any:
    zero = splat(_ZERO)
    return zero - maximum(zero - a, zero - b)


@njit
def _value(code: Any, operands: Any, gate: Any, up: Any, gated: Any) -> Any:
    if code == _CLAMPED:
        limit = splat(load_f32(operand(operands, Operand.FACTORS)))
        alpha = splat(load_f32(operand(operands, Operand.FACTORS) + 4))
        gate = _minimum(gate, limit)
        up = maximum(_minimum(up, limit), splat(_ZERO) - limit)
        return (up + splat(_ONE)) * sigmoid_times(gate, gate * alpha)
    return _activation(code, gate) * up if gated else _activation(code, gate)


@njit
def _token_gate(operands: Any, row: Any) -> Any:
    gates = operand(operands, Operand.TOKEN_GATES)
    if gates == 0:
        return splat(_ONE)
    return sigmoid_times(splat(_ONE), splat(load_f32(gates + 4 * row)))


@njit
def _activation(code: Any, x: Any) -> Any:
    if code == 0:
        return sigmoid_times(x, x)
    if code == 1:
        return normal_times(x)
    if code == 2:
        return sigmoid_times(x, x * fma(x * x, splat(_CUBIC), splat(_LINEAR)))
    return maximum(splat(_ZERO), x)


@cache
def _kernel(code: int) -> Kernel:
    """For the activation `_NAMES[code]`, or the clamped gate. Numba keeps closures over plain
    constants on disk."""

    def activated(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        up = operand(operands, Operand.UP)
        first, stop = share(operand(operands, Operand.CHANNELS), LANES, thread, threads)
        for row in range(operand(step, Header.ROWS)):
            skip = row * operand(operands, Operand.BYTES)
            gate = operand(operands, Operand.GATE) + skip
            y = operand(operands, Operand.Y) + row * operand(operands, Operand.Y_BYTES)
            weight = _token_gate(operands, row)
            beside = up + skip if up else gate
            for i in range(4 * first, 4 * (stop - LANES + 1), 4 * LANES):
                value = _value(code, operands, load(gate + i), load(beside + i), up != 0)
                store(y + i, value * weight)
            rest = (stop - first) % LANES
            if rest:
                i = 4 * (stop - rest)
                parts = load_part(gate + i, rest), load_part(beside + i, rest)
                value = _value(code, operands, parts[0], parts[1], up != 0)
                store_part(y + i, value * weight, rest)
        return 0

    return Kernel(activated)
