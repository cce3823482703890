"""Rows of attention between the tiles: packed, weighed by an online softmax, written out."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from shards.kernels.cpu.attention_operands import Operand, Part, padded, part_at
from shards.kernels.cpu.attention_tiles import QUERIES, TILE, exp2_down
from shards.kernels.cpu.elementary import tanh
from shards.kernels.cpu.emission import BYTES, LANES
from shards.kernels.cpu.kernel import operand
from shards.kernels.cpu.simd import (
    load,
    load_f32,
    load_i64,
    max_lanes,
    maximum,
    splat,
    store,
    store_f32,
    sum_lanes,
)

_ZERO: Final = np.float32(0)
_MASKED: Final = np.float32(-np.inf)


@njit
def _row_at(base: Any, row_bytes: Any, span: Any, kv_group: Any, row: Any, head_dim: Any) -> Any:
    """Address of a span's row in a buffer of queries or answers."""
    first_head, group = kv_group
    token, head = load_i64(span) + row // group, first_head + row % group
    return base + token * row_bytes + 4 * head_dim * head


@njit
def start_rows(operands: Any, thread: Any, span: Any, kv_group: Any, first: Any, rows: Any) -> None:
    """Pack the queries of a band's tiles, channel by channel; no position has been seen yet."""
    head_dim = operand(operands, Operand.HEAD_DIM)
    source, row_bytes = operand(operands, Operand.QUERIES), operand(operands, Operand.QUERY_BYTES)
    packed = part_at(operands, thread, Part.QUERIES)
    states = part_at(operands, thread, Part.STATES)
    sums = part_at(operands, thread, Part.SUMS)
    scale = load_f32(operand(operands, Operand.FACTORS))
    tiles = -(-rows // QUERIES)
    for tile in range(tiles):
        begin = tile * rows // tiles
        into = packed + 4 * QUERIES * head_dim * tile
        for r in range(begin, (tile + 1) * rows // tiles):
            at = _row_at(source, row_bytes, span, kv_group, first + r, head_dim)
            for d in range(head_dim):
                store_f32(into + 4 * (QUERIES * d + r - begin), load_f32(at + 4 * d) * scale)
            head = kv_group[0] + (first + r) % kv_group[1]
            constants = operand(operands, Operand.HEADS) + 12 * head
            store_f32(states + 8 * r, load_f32(constants))
            store_f32(states + 8 * r + 4, load_f32(constants + 4))
    for i in range(rows * padded(head_dim)):
        store_f32(sums + 4 * i, _ZERO)


@njit
def _fill(at: Any, start: Any, stop: Any, value: Any) -> None:
    for i in range(start, stop):
        store_f32(at + 4 * i, value)


@njit
def _weigh_row(scores: Any, vectors: Any, state: Any, decay: Any) -> None:
    """Scores to weights, in place; the row's maximum and sum are brought up to date."""
    top = load(scores)
    for v in range(1, vectors):
        top = maximum(top, load(scores + BYTES * v))
    before, most = load_f32(state), max_lanes(top)
    now = most if most > before else before
    store(decay, exp2_down(splat(before - now)))
    total, level = splat(_ZERO), splat(now)
    for v in range(vectors):
        weights = exp2_down(load(scores + BYTES * v) - level)
        store(scores + BYTES * v, weights)
        total = total + weights
    store_f32(state, now)
    store_f32(state + 4, load_f32(state + 4) * load_f32(decay) + sum_lanes(total))


@njit
def weigh_rows(
    operands: Any,
    thread: Any,
    span: Any,
    kv_group: Any,
    first: Any,
    begin: Any,
    count: Any,
    base: Any,
    vectors: Any,
) -> None:
    """Scores of rows first + begin.. to weights: cap, slope, mask, softmax."""
    first_head, group = kv_group
    window = operand(operands, Operand.WINDOW)
    cap = load_f32(operand(operands, Operand.FACTORS) + 4)
    decays = part_at(operands, thread, Part.DECAYS)
    states = part_at(operands, thread, Part.STATES) + 8 * begin
    for r in range(count):
        scores = part_at(operands, thread, Part.SCORES) + 4 * TILE * r
        row = first + begin + r
        place = load_i64(span + 16) - load_i64(span + 8) + row // group - base
        if operand(operands, Operand.CAPPED):
            for v in range(vectors):
                at = scores + BYTES * v
                store(at, splat(cap) * tanh(load(at) / splat(cap)))
        if operand(operands, Operand.SLOPED):
            head = operand(operands, Operand.HEADS) + 12 * (first_head + row % group)
            slope = load_f32(head + 8)
            for i in range(vectors * LANES):
                at = scores + 4 * i
                store_f32(at, load_f32(at) + slope * np.float32(i - place))
        if window > 0:
            _fill(scores, 0, min(place + 1 - window, vectors * LANES), _MASKED)
        _fill(scores, max(place + 1, 0), vectors * LANES, _MASKED)
        _weigh_row(scores, vectors, states + 8 * r, decays + BYTES * r)


@njit
def finish_rows(
    operands: Any, thread: Any, span: Any, kv_group: Any, first: Any, rows: Any
) -> None:
    head_dim = operand(operands, Operand.HEAD_DIM)
    target, row_bytes = operand(operands, Operand.OUT), operand(operands, Operand.OUT_BYTES)
    states = part_at(operands, thread, Part.STATES)
    sums = part_at(operands, thread, Part.SUMS)
    for r in range(rows):
        at = _row_at(target, row_bytes, span, kv_group, first + r, head_dim)
        weight = load_f32(states + 8 * r + 4)
        for d in range(head_dim):
            total = load_f32(sums + 4 * (padded(head_dim) * r + d))
            # 0 + -0 is 0: what weighs 0 may turn one into the other.
            store_f32(at + 4 * d, total / weight + _ZERO)
