"""The compiled kernel of attention over a paged KV cache, for prefill and decode alike.

Softmax is computed online, tile by tile of the cache (arXiv:1805.02867), so that scores never leave
the first-level cache (arXiv:2205.14135). The query heads that read one KV head are rows of the same
band, and in a prefill those of several tokens: row i of a span is query head i % group of token
i // group. What a band reads of the cache serves all its rows.

Tiles begin at multiples of TILE positions, and what a row does not see weighs exactly 0: its answer
does not depend on the rows beside it. Logits are kept in powers of two: queries are scaled by
log2(e) as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import njit

from shards.kernels.cpu.attention_operands import (
    BAND_ROWS,
    Operand,
    Part,
    heads_of,
    padded,
    part_at,
    reach,
)
from shards.kernels.cpu.attention_rows import finish_rows, start_rows, weigh_rows
from shards.kernels.cpu.attention_tiles import QUERIES, TILE, score_tile, value_tile
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Kernel, operand, share
from shards.kernels.cpu.paged_cache import bytes_of, copy_cached
from shards.kernels.cpu.simd import load_i64, store_i64


@njit
def _cost(start: Any, stop: Any, rows: Any) -> Any:
    """Of a band: tiles of rows x tiles of the cache."""
    return -(-rows // QUERIES) * (-(-stop // TILE) - start // TILE)


@njit
def _whole_cost(operands: Any, step: Any) -> Any:
    """Of all bands of the step."""
    total = 0
    for s in range(operand(step, Header.SPANS)):
        span = operand(operands, Operand.SPANS) + 32 * s
        for kv in range(operand(operands, Operand.KV_HEADS)):
            _, group = heads_of(operands, kv)
            span_rows = load_i64(span + 8) * group
            for first in range(0, span_rows, BAND_ROWS):
                rows = min(BAND_ROWS, span_rows - first)
                start, stop = reach(operands, span, group, first, rows)
                total += _cost(start, stop, rows)
    return total


@njit
def _addresses(operands: Any, thread: Any, base: Any) -> Any:
    """Where a tile's columns and runs are kept: every other tile in the same place."""
    odd = base // TILE % 2
    columns = part_at(operands, thread, Part.COLUMNS) + odd * 8 * TILE // LANES
    return columns, part_at(operands, thread, Part.RUNS) + odd * 8 * TILE


@njit
def _find_tile(
    operands: Any, thread: Any, table: Any, kv: Any, size: Any, base: Any, first: Any, end: Any
) -> None:
    """Where a tile's positions first..end lie, vector by vector of keys and run by run of values.

    Vectors outside are masked later: any address serves them.
    """
    start, stop = max(first - base, 0), min(end - base, TILE)
    block_size = operand(operands, Operand.BLOCK_SIZE)
    head_dim = operand(operands, Operand.HEAD_DIM)
    head_bytes = block_size * head_dim * size
    block_bytes = head_bytes * operand(operands, Operand.KV_HEADS)
    keys = operand(operands, Operand.KEYS) + head_bytes * kv
    values = operand(operands, Operand.VALUES) + head_bytes * kv
    columns, runs = _addresses(operands, thread, base)
    run = min(block_size, TILE)
    for v in range(TILE // LANES):
        at = base + max(min(v * LANES, (stop - 1) // LANES * LANES), start)
        block = block_bytes * load_i64(table + 8 * (at // block_size))
        store_i64(columns + 8 * v, keys + block + at % block_size * size)
    for r in range(start // run, -(-stop // run)):
        at = base + run * r
        block = block_bytes * load_i64(table + 8 * (at // block_size))
        store_i64(runs + 8 * r, values + block + at % block_size * head_dim * size)


@njit
def _copy_tile(
    code: Any,
    operands: Any,
    thread: Any,
    table: Any,
    kv: Any,
    size: Any,
    base: Any,
    first: Any,
    end: Any,
) -> None:
    """`_find_tile` for sizes that vectors do not divide: of a copy, whose runs are positions."""
    start, stop = max(first - base, 0), min(end - base, TILE)
    block_size = operand(operands, Operand.BLOCK_SIZE)
    head_dim = operand(operands, Operand.HEAD_DIM)
    head_bytes = block_size * head_dim * size
    block_bytes = head_bytes * operand(operands, Operand.KV_HEADS)
    keys, values = part_at(operands, thread, Part.KEYS), part_at(operands, thread, Part.VALUES)
    columns, runs = _addresses(operands, thread, base)
    for v in range(TILE // LANES):
        store_i64(columns + 8 * v, keys + LANES * size * v)
    for i in range(start, stop):
        block = block_bytes * load_i64(table + 8 * ((base + i) // block_size)) + head_bytes * kv
        at = (base + i) % block_size
        from_k = operand(operands, Operand.KEYS) + block + at * size
        from_v = operand(operands, Operand.VALUES) + block + at * head_dim * size
        row = values + padded(head_dim) * size * i
        store_i64(runs + 8 * i, row)
        for d in range(head_dim):
            copy_cached(code, keys + (TILE * d + i) * size, from_k + block_size * size * d)
            copy_cached(code, row + size * d, from_v + size * d)


@cache
def attention_kernel(code: int) -> Kernel:
    """For a cache whose dtype is `paged_cache.DTYPES[code]`."""
    size = bytes_of(code)

    def attend(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        block_size = operand(operands, Operand.BLOCK_SIZE)
        head_dim = operand(operands, Operand.HEAD_DIM)
        wide = padded(head_dim)
        scores = part_at(operands, thread, Part.SCORES)
        decays = part_at(operands, thread, Part.DECAYS)
        # Whole vectors lie in a block, and whole blocks in a tile or the other way round.
        in_place = (
            wide == head_dim
            and block_size % LANES == 0
            and (TILE % block_size == 0 or block_size % TILE == 0)
        )
        run = min(block_size, TILE) if in_place else 1
        key_bytes = size * (block_size if in_place else TILE)
        # Bands go to threads in turn, by their cost.
        begin, end = share(_whole_cost(operands, step), 1, thread, threads)
        s, kv, first, done = 0, 0, 0, 0
        while done < end:
            span = operand(operands, Operand.SPANS) + 32 * s
            table = operand(operands, Operand.TABLES)
            table += 8 * operand(step, Header.TABLE) * load_i64(span + 24)
            kv_group = heads_of(operands, kv)
            group = kv_group[1]
            rows = min(BAND_ROWS, load_i64(span + 8) * group - first)
            tiles = -(-rows // QUERIES)
            seen, stop = reach(operands, span, group, first, rows)
            readable = seen // block_size * block_size  # blocks before it may hold anything
            mine = done >= begin
            if mine:
                start_rows(operands, thread, span, kv_group, first, rows)
                if in_place:
                    base = seen // TILE * TILE
                    _find_tile(operands, thread, table, kv, size, base, readable, stop)
            for base in range(seen // TILE * TILE, stop if mine else 0, TILE):
                if not in_place:
                    _copy_tile(code, operands, thread, table, kv, size, base, readable, stop)
                elif base + TILE < stop:
                    _find_tile(operands, thread, table, kv, size, base + TILE, readable, stop)
                keys, values = _addresses(operands, thread, base)
                next_keys, next_values = _addresses(operands, thread, base + TILE)
                first_run = max(readable - base, 0) // run
                for tile in range(tiles):
                    above = tile * rows // tiles
                    count = (tile + 1) * rows // tiles - above
                    sees, last = reach(operands, span, group, first + above, count)
                    if last <= base or sees >= base + TILE:
                        continue
                    queries = part_at(operands, thread, Part.QUERIES)
                    queries += 4 * QUERIES * head_dim * tile
                    sums = part_at(operands, thread, Part.SUMS) + 4 * wide * above
                    there = min(last - base, TILE)
                    vectors = -(-there // LANES)
                    score_tile(
                        code, queries, keys, next_keys, key_bytes, head_dim, count, vectors, scores
                    )
                    weigh_rows(operands, thread, span, kv_group, first, above, count, base, vectors)
                    value_tile(
                        code, scores, values, next_values, run, size * wide, first_run, there,
                        decays, sums, 4 * wide, count,
                    )  # fmt: skip
            if mine:
                finish_rows(operands, thread, span, kv_group, first, rows)
            done += _cost(seen, stop, rows)
            first += rows
            if first == load_i64(span + 8) * group:
                first, kv = 0, kv + 1
            if kv == operand(operands, Operand.KV_HEADS):
                kv, s = 0, s + 1
        return 0

    return Kernel(attend)
