"""What the attention kernel is told, its working memory, and what follows from both."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

from numba import njit

from shards.kernels.cpu.attention_tiles import QUERIES, TILE
from shards.kernels.cpu.emission import BYTES, LANES
from shards.kernels.cpu.kernel import operand
from shards.kernels.cpu.simd import load_i64

# Rows that share a walk through the cache: whole tiles of QUERIES.
BAND_ROWS: Final = 48


class Operand(IntEnum):
    """Of the attention kernel: addresses, unless said otherwise."""

    QUERIES = 0  # float32 [rows, heads * head_dim], rotated
    QUERY_BYTES = 1  # from row to row
    OUT = 2  # float32 [rows, heads * head_dim]
    OUT_BYTES = 3  # from row to row
    KEYS = 4  # [blocks, kv_heads, head_dim, block_size]
    VALUES = 5  # [blocks, kv_heads, block_size, head_dim]
    KV_HEADS = 6  # a number
    BLOCK_SIZE = 7  # a number
    HEAD_DIM = 8  # a number
    SPANS = 9  # int64 [SPANS, 4]: first row, rows, context, row of its block table
    TABLES = 10  # int64 [.., TABLE]: block ids
    GROUPS = 11  # int64 [kv_heads, 2]: first query head, query heads
    HEADS = 12  # float32 [heads, 3]: the maximum and the sum to begin with, the ALiBi slope
    FACTORS = 13  # float32 [2]: the scale of queries, the cap of logits
    WINDOW = 14  # positions seen; 0: all
    CAPPED = 15  # 1 where logits have a cap
    SLOPED = 16  # 1 where a slope is not 0
    SCRATCH = 17  # of thread 0
    SCRATCH_BYTES = 18  # from thread to thread
    PARTS = 19  # int64 [Part]: where each part of a thread's scratch begins


class Part(IntEnum):
    """Of a thread's scratch."""

    COLUMNS = 0  # int64 [2, TILE / LANES]: the keys of each vector of a tile's positions
    RUNS = 1  # int64 [2, TILE]: the values of each run of a tile's positions
    DECAYS = 2  # [QUERIES, LANES]: what a row's sums so far are multiplied by
    SCORES = 3  # [QUERIES, TILE]: scores, then weights
    STATES = 4  # [BAND_ROWS, 2]: maximum so far, sum of weights so far
    QUERIES = 5  # [BAND_ROWS / QUERIES, head_dim, QUERIES]: the band's queries, scaled
    SUMS = 6  # [BAND_ROWS, padded head_dim]: weighted values so far
    KEYS = 7  # [head_dim, TILE]: a tile's keys, where they had to be copied
    VALUES = 8  # [TILE, padded head_dim]: a tile's values, likewise


def scratch_parts(head_dim: int) -> list[int]:
    """Bytes of each part."""
    wide = -(-head_dim // LANES) * LANES
    sizes = {
        Part.COLUMNS: 16 * TILE // LANES,
        Part.RUNS: 16 * TILE,
        Part.DECAYS: BYTES * QUERIES,
        Part.SCORES: 4 * QUERIES * TILE,
        Part.STATES: 8 * BAND_ROWS,
        Part.QUERIES: 4 * BAND_ROWS * head_dim,
        Part.SUMS: 4 * BAND_ROWS * wide,
        Part.KEYS: 4 * head_dim * TILE,
        Part.VALUES: 4 * TILE * wide,
    }
    return [sizes[part] for part in Part]


@njit
def padded(channels: Any) -> Any:
    return -(-channels // LANES) * LANES


@njit
def part_at(operands: Any, thread: Any, part: Any) -> Any:
    scratch = operand(operands, Operand.SCRATCH)
    scratch += thread * operand(operands, Operand.SCRATCH_BYTES)
    return scratch + load_i64(operand(operands, Operand.PARTS) + 8 * part)


@njit
def heads_of(operands: Any, kv: Any) -> Any:
    """Query heads that read a KV head: (the first, how many)."""
    at = operand(operands, Operand.GROUPS) + 16 * kv
    return load_i64(at), load_i64(at + 8)


@njit
def reach(operands: Any, span: Any, group: Any, first: Any, rows: Any) -> Any:
    """Positions start..stop of which rows `first`.. of a span see any."""
    origin = load_i64(span + 16) - load_i64(span + 8)  # of the span's first token
    window = operand(operands, Operand.WINDOW)
    start = 0 if window == 0 else max(0, origin + first // group + 1 - window)
    return start, origin + (first + rows - 1) // group + 1
