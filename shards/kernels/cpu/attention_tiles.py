"""Register tiles of attention: scores of a few queries, and their weighted sum of values.

A tile of queries is up to `QUERIES` rows that read the same KV head; a tile of the cache is `TILE`
positions. Every score is one chain of fused multiply-adds over the channels and every output one
chain over the positions, whatever rows share the registers: a query's answer has the same bits in
a prefill chunk and in a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from llvmlite import ir
from numba import types
from numba.core import cgutils

from shards.kernels.cpu.emission import (
    BYTES,
    F32,
    I8,
    I32,
    I64,
    LANES,
    REGISTERS,
    call_llvm,
    constant,
    emits,
    load_ir,
    splat_ir,
    store_ir,
    suffix,
)
from shards.kernels.cpu.paged_cache import bytes_of, emits_by_dtype, load_wide
from shards.kernels.cpu.simd import floats

TILE: Final = 64  # positions
QUERIES: Final = 6  # rows; their accumulators and operands fill the registers


def _columns(rows: int) -> int:
    """Vectors beside each other: as many chains as hide a multiply-add's latency and still fit."""
    if REGISTERS == 32:
        return 4
    return {1: 8, 2: 4, 3: 4}.get(rows, 2)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a.type, [a, b, c])


def _at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, size: int) -> ir.Value:
    return builder.add(base, builder.mul(index, I64(size)))


def _broadcast(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return splat_ir(builder, load_ir(builder, address, F32), LANES)


@contextmanager
def _loop(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value) -> Iterator[ir.Value]:
    """Run the body for start <= i < stop. LLVM leaves the loop as it is: bodies are wide enough,
    and unrolling dozens of them takes seconds."""
    before, module = builder.block, builder.module
    head, body, end = (
        builder.append_basic_block(f"loop.{part}") for part in ("head", "body", "end")
    )
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", i, stop), body, end)
    builder.position_at_end(body)
    yield i
    i.add_incoming(builder.add(i, I64(1)), builder.block)
    latch = builder.branch(head)
    keep = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    # What tells loops apart is a node that names itself first.
    loop = module.add_metadata([I64(len(module.metadata)), keep])
    loop.operands = (loop, keep)
    latch.set_metadata("llvm.loop", loop)
    builder.position_at_end(end)


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    pointer = builder.inttoptr(address, I8.as_pointer())
    read, near, data = I32(0), I32(3), I32(1)
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, near, data])


class _Tile:
    """`rows` x `columns` accumulators, which LLVM keeps in registers."""

    def __init__(self, builder: ir.IRBuilder, rows: int, columns: int) -> None:
        self._builder = builder
        self._sums = [
            [cgutils.alloca_once(builder, floats.ir) for _ in range(columns)] for _ in range(rows)
        ]

    def each(self) -> list[tuple[int, int, ir.Value]]:
        """(row, column, accumulator)."""
        return [(r, c, at) for r, row in enumerate(self._sums) for c, at in enumerate(row)]

    def multiply_add(
        self, row_factor: Callable[[int], ir.Value], column_factor: Callable[[int], ir.Value]
    ) -> None:
        """Add an outer product. Whichever side is shorter stays in registers."""
        builder, rows, columns = self._builder, len(self._sums), len(self._sums[0])

        def add(r: int, c: int, a: ir.Value, b: ir.Value) -> None:
            at = self._sums[r][c]
            builder.store(_fma(builder, a, b, builder.load(at)), at)

        if rows < columns:
            factors = [row_factor(r) for r in range(rows)]
            for c in range(columns):
                b = column_factor(c)
                for r in range(rows):
                    add(r, c, factors[r], b)
        else:
            factors = [column_factor(c) for c in range(columns)]
            for r in range(rows):
                a = row_factor(r)
                for c in range(columns):
                    add(r, c, a, factors[c])


def _by_rows(builder: ir.IRBuilder, rows: ir.Value, emit: Callable[[int], None]) -> None:
    """Emit a body for every number of rows and choose among them."""
    end = builder.append_basic_block("rows.end")
    unknown = builder.append_basic_block("rows.unknown")
    switch = builder.switch(rows, unknown)
    builder.position_at_end(unknown)
    builder.unreachable()
    for number in range(1, QUERIES + 1):
        block = builder.append_basic_block(f"rows.{number}")
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        emit(number)
        builder.branch(end)
    builder.position_at_end(end)


@emits_by_dtype(types.void, *[types.int64] * 8)
def score_tile(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> None:
    """Scores of `rows` queries at the positions of `vectors` vectors.

    (queries [channels, QUERIES], keys [vectors] addresses, ahead [vectors] addresses to fetch for
    the next tile, key_bytes from channel to channel, channels, rows, vectors, scores [QUERIES,
    TILE]). Reads and writes `vectors` rounded up to what fits the registers.
    """
    queries, keys, ahead, key_bytes, channels, rows, vectors, scores = arguments

    def emit(number: int) -> None:
        columns = _columns(number)
        steps = builder.sdiv(builder.add(vectors, I64(columns - 1)), I64(columns))
        with _loop(builder, I64(0), steps) as step:
            first = builder.mul(step, I64(columns))
            bases, ahead_bases = (
                [
                    load_ir(builder, _at(builder, table, builder.add(first, I64(c)), 8), I64)
                    for c in range(columns)
                ]
                for table in (keys, ahead)
            )
            tile = _Tile(builder, number, columns)
            for _, _, at in tile.each():
                builder.store(constant(floats.ir, 0.0), at)
            with _loop(builder, I64(0), channels) as channel:
                query = _at(builder, queries, channel, 4 * QUERIES)
                offset = builder.mul(channel, key_bytes)
                for base in ahead_bases:
                    _prefetch(builder, builder.add(base, offset))
                tile.multiply_add(
                    lambda r: _broadcast(builder, builder.add(query, I64(4 * r))),
                    lambda c: load_wide(builder, code, builder.add(bases[c], offset), LANES),
                )
            out = _at(builder, scores, first, BYTES)
            for r, c, at in tile.each():
                place = builder.add(out, I64(4 * TILE * r + BYTES * c))
                store_ir(builder, builder.load(at), place)

    _by_rows(builder, rows, emit)


@emits_by_dtype(types.void, *[types.int64] * 11)
def value_tile(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> None:
    """out = out * decay + weights x values.

    (weights [QUERIES, TILE], values [runs] addresses, ahead [runs] addresses to fetch for the next
    tile, run positions in a run, value_bytes from
    position to position, first run, stop position, decays [QUERIES, LANES], out [rows, ..],
    out_bytes, rows): the runs lie `run` positions apart in the tile; positions from the first
    run's to `stop`. Channels are those of `out_bytes`, in whole vectors.
    """
    weights, values, ahead, run, value_bytes, first, stop, decays, out, out_bytes, rows = arguments
    vectors = builder.sdiv(out_bytes, I64(BYTES))

    def emit_columns(number: int, columns: int, column: ir.Value) -> None:
        tile = _Tile(builder, number, columns)
        into = _at(builder, out, column, BYTES)
        places = [
            builder.add(builder.add(into, builder.mul(out_bytes, I64(r))), I64(BYTES * c))
            for r, c, _ in tile.each()
        ]
        for (r, _, at), place in zip(tile.each(), places, strict=True):
            decay = load_ir(builder, builder.add(decays, I64(BYTES * r)), floats.ir)
            builder.store(builder.fmul(load_ir(builder, place, floats.ir), decay), at)
        skip = _at(builder, I64(0), column, LANES * bytes_of(code))
        runs = builder.sdiv(builder.sub(builder.add(stop, run), I64(1)), run)
        with _loop(builder, first, runs) as each:
            base = builder.add(load_ir(builder, _at(builder, values, each, 8), I64), skip)
            ahead_base = load_ir(builder, _at(builder, ahead, each, 8), I64)
            ahead_base = builder.add(ahead_base, skip)
            start = builder.mul(each, run)
            left = builder.sub(stop, start)
            count = builder.select(builder.icmp_signed("<", left, run), left, run)
            run_weights = _at(builder, weights, start, 4)
            with _loop(builder, I64(0), count) as position:
                weight = _at(builder, run_weights, position, 4)
                offset = builder.mul(position, value_bytes)
                value = builder.add(base, offset)
                for c in range(columns):
                    line = builder.add(offset, I64(c * LANES * bytes_of(code)))
                    _prefetch(builder, builder.add(ahead_base, line))
                tile.multiply_add(
                    lambda r: _broadcast(builder, builder.add(weight, I64(4 * TILE * r))),
                    lambda c: load_wide(
                        builder, code, builder.add(value, I64(c * LANES * bytes_of(code))), LANES
                    ),
                )
        for (_, _, at), place in zip(tile.each(), places, strict=True):
            store_ir(builder, builder.load(at), place)

    def emit(number: int) -> None:
        columns = _columns(number)
        whole = builder.sdiv(vectors, I64(columns))
        with _loop(builder, I64(0), whole) as group:
            emit_columns(number, columns, builder.mul(group, I64(columns)))
        with _loop(builder, builder.mul(whole, I64(columns)), vectors) as column:
            emit_columns(number, 1, column)

    _by_rows(builder, rows, emit)


@emits(floats, floats)
def exp2_down(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """2^x for x <= 0 within 1 ulp, 0 below -126, NaN of NaN.

    x = n + r with |r| <= 1/2; 2^r by a minimax polynomial (relative error 2e-9). Adding 1.5 x 2^23
    to x leaves n, and with 127 more its biased exponent, in the lowest bits of the sum.
    """
    (x,) = arguments
    kind = x.type
    shift = constant(kind, 1.5 * 2.0**23 + 127)
    shifted = builder.fadd(x, shift)
    r = builder.fsub(x, builder.fsub(shifted, shift))
    power = constant(kind, 0.00015353361812725855)
    for coefficient in (
        0.0013398874445425396,
        0.009618437358304706,
        0.05550332471026795,
        0.24022647913619585,
        0.6931472028551287,
        1.0,
    ):
        power = _fma(builder, power, r, constant(kind, coefficient))
    bits = builder.bitcast(shifted, ir.VectorType(I32, LANES))
    scale = builder.bitcast(builder.shl(bits, constant(bits.type, 23)), kind)
    below = builder.fcmp_ordered("<", x, constant(kind, -126.0))
    return builder.select(below, constant(kind, 0.0), builder.fmul(power, scale))
