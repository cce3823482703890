"""What a rank tells of its slice of the logits: the largest, and the sum of their exponentials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types

from shards.kernels.cpu.emission import I64, LANES, emits
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import (
    exp,
    floats,
    load,
    load_f32,
    load_i64,
    splat,
    store_f32,
    store_i64,
    sum_lanes,
)

_ZERO: Final = np.float32(0)


class Operand(IntEnum):
    """Of both kernels; addresses, unless said otherwise."""

    LOGITS = 0  # float32 [sampled, width]
    LOGITS_BYTES = 1  # from row to row
    WIDTH = 2  # a number
    VALUES = 3  # float32 [sampled, k]: the largest
    INDICES = 4  # int64 [sampled, k]: where they stand
    K = 5  # a number
    SUMS = 6  # float32 [sampled]: of e^(logit - the largest)


def top_k(
    logits: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
) -> tuple[Instruction, ...]:
    """The k largest logits of each sampled row, falling, and their places in the row.

    logits: float32 [most sampled, width]; values: float32 and indices: int64 [most sampled, k]. Of
    equals the first comes first; NaN is larger than any number, as in `torch.argmax`. Raises
    `ValueError` where a row has fewer than k logits.
    """
    k = values.shape[1]
    if k > logits.shape[1]:
        raise ValueError(f"the {k} largest of {logits.shape[1]} logits; ask for no more than those")
    return _instruction(_TOP_K, logits, values, indices=indices, k=k)


def sum_exponentials(
    logits: torch.Tensor, largest: torch.Tensor, sums: torch.Tensor
) -> tuple[Instruction, ...]:
    """sums[r] = sum of e^(logit - largest[r, 0]) over row r, for every sampled row.

    logits: float32 [most sampled, width]; largest: float32 [most sampled, k], from `top_k`; sums:
    float32 [most sampled]. Then largest + ln(sum) is the slice's log-sum-exp.
    """
    return _instruction(_SUM_EXPONENTIALS, logits, largest, sums=sums, k=largest.shape[1])


def _instruction(
    kernel: Kernel,
    logits: torch.Tensor,
    values: torch.Tensor,
    *,
    k: int,
    indices: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> tuple[Instruction, ...]:
    operands = {
        Operand.LOGITS: logits.data_ptr(),
        Operand.LOGITS_BYTES: 4 * logits.stride(0),
        Operand.WIDTH: logits.shape[1],
        Operand.VALUES: values.data_ptr(),
        Operand.INDICES: 0 if indices is None else indices.data_ptr(),
        Operand.K: k,
        Operand.SUMS: 0 if sums is None else sums.data_ptr(),
    }
    keeps = (logits, values, indices, sums)
    return (Instruction(kernel, tuple(operands[name] for name in Operand), keeps),)


@emits(types.int64, floats, floats)
def _not_at_most(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """A bit for every lane where a is larger than b, or either is NaN."""
    mask = builder.fcmp_unordered(">", *arguments)
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I64)


@njit
def _insert(value: Any, index: Any, values: Any, indices: Any, have: Any, k: Any) -> Any:
    """Put a logit among the `have` largest so far; returns how many there are now."""
    at = have
    while at > 0:
        before = load_f32(values + 4 * (at - 1))
        if not (value > before or (value != value and before == before)):
            break
        if at < k:
            store_f32(values + 4 * at, before)
            store_i64(indices + 8 * at, load_i64(indices + 8 * (at - 1)))
        at -= 1
    if at < k:
        store_f32(values + 4 * at, value)
        store_i64(indices + 8 * at, index)
    return min(have + 1, k)


def _top_k(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    width, k = operand(operands, Operand.WIDTH), operand(operands, Operand.K)
    whole = width // LANES * LANES
    first, stop = share(operand(step, Header.SAMPLED), 1, thread, threads)
    for row in range(first, stop):
        logits = operand(operands, Operand.LOGITS) + row * operand(operands, Operand.LOGITS_BYTES)
        values = operand(operands, Operand.VALUES) + 4 * k * row
        indices = operand(operands, Operand.INDICES) + 8 * k * row
        have, least = 0, np.float32(-np.inf)
        for i in range(0, width, LANES):
            candidates = min(LANES, width - i)
            if have == k and i < whole and _not_at_most(load(logits + 4 * i), splat(least)) == 0:
                continue
            for index in range(i, i + candidates):
                have = _insert(load_f32(logits + 4 * index), index, values, indices, have, k)
            least = load_f32(values + 4 * (have - 1))
    return 0


def _sum_exponentials(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    width, k = operand(operands, Operand.WIDTH), operand(operands, Operand.K)
    whole = width // LANES * LANES
    first, stop = share(operand(step, Header.SAMPLED), 1, thread, threads)
    for row in range(first, stop):
        logits = operand(operands, Operand.LOGITS) + row * operand(operands, Operand.LOGITS_BYTES)
        largest = load_f32(operand(operands, Operand.VALUES) + 4 * k * row)
        sums = splat(_ZERO)
        for i in range(0, whole, LANES):
            sums = sums + exp(load(logits + 4 * i) - splat(largest))
        total = sum_lanes(sums)
        for i in range(whole, width):
            total += np.float32(math.exp(load_f32(logits + 4 * i) - largest))
        store_f32(operand(operands, Operand.SUMS) + 4 * row, total)
    return 0


_TOP_K, _SUM_EXPONENTIALS = Kernel(_top_k), Kernel(_sum_exponentials)
