"""Register tiles of a quantised matmul: a few rows by a panel of outputs, as LLVM IR.

`integer_panels` says how weights and activations lie. A group's sum of products is exact in int32,
whatever instruction adds it up; the groups are joined by one chain of fused multiply-adds per
output in the order of the inputs. So an output has the same bits in whatever tile, and on whatever
processor, it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shards.kernels.cpu.emission import (
    BYTES,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call_llvm,
    constant,
    emits,
    load_ir,
    prefetch_ir,
    splat_ir,
    store_ir,
    suffix,
    widen_ir,
)
from shards.kernels.cpu.integer_dot import BYTE_LANES, DOT, WORDS
from shards.kernels.cpu.integer_panels import (
    PANEL,
    SCHEMES,
    STEPS,
    TILE_ROWS,
    VECTORS,
    Record,
    block_bytes,
    code_bytes,
    groups_of,
    zero_of,
)
from shards.kernels.cpu.simd import floats
from shards.quantization.scheme import BLOCK, Scheme

# Bytes ahead of the weights in use that memory is read. Without it the processor's own prefetching
# stops at every page, and loses track where several lines of a block are read out of order.
_AHEAD: Final = 8192
_LINE: Final = 64

_Broadcast = Callable[[int, int, ir.Type], ir.Value]  # row, offset in its record, type


@intrinsic
def tile(
    _context: Any, scheme: Any, rows: Any, weights: Any, records: Any, out: Any, blocks: Any
) -> Any:
    """(scheme, rows, weights, records, out, blocks): `out` float32 [rows][PANEL] = x W^T.

    `scheme` and `rows` are constants; the others addresses of a panel, of the first row's first
    record and of the result, and the number of blocks of the panel.
    """
    if not (isinstance(scheme, types.IntegerLiteral) and isinstance(rows, types.IntegerLiteral)):
        return None
    chosen, count = SCHEMES[scheme.literal_value], rows.literal_value

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _tile(builder, chosen, count, *arguments[2:])
        return context.get_dummy_value()

    return types.void(scheme, rows, *[types.int64] * 4), generate


def _tile(
    builder: ir.IRBuilder,
    scheme: Scheme,
    rows: int,
    weights: ir.Value,
    records: ir.Value,
    out: ir.Value,
    blocks: ir.Value,
) -> None:
    cells = [(row, vector) for row in range(rows) for vector in range(VECTORS)]
    totals = {cell: cgutils.alloca_once(builder, floats.ir) for cell in cells}
    for total in totals.values():
        builder.store(constant(floats.ir, 0.0), total)
    with cgutils.for_range(builder, blocks) as loop:
        block = builder.add(weights, builder.mul(loop.index, I64(block_bytes(scheme))))
        record = builder.add(records, builder.mul(loop.index, I64(TILE_ROWS * Record.END)))
        for line in range(0, block_bytes(scheme), _LINE):
            prefetch_ir(builder, builder.add(block, I64(_AHEAD + line)))
        sums = {cell: builder.load(totals[cell]) for cell in cells}
        _block(builder, scheme, sums, block, record)
        for cell in cells:
            builder.store(sums[cell], totals[cell])
    for row, vector in cells:
        at = builder.add(out, I64(BYTES * (row * VECTORS + vector)))
        store_ir(builder, builder.load(totals[row, vector]), at)


def _block(
    builder: ir.IRBuilder,
    scheme: Scheme,
    sums: dict[tuple[int, int], ir.Value],
    block: ir.Value,
    record: ir.Value,
) -> None:
    """Add the products of 32 inputs to each row's and vector's sums."""

    def broadcast(row: int, offset: int, kind: ir.Type) -> ir.Value:
        at = builder.add(record, I64(row * Record.END + offset))
        return splat_ir(builder, load_ir(builder, at, kind), LANES)

    def halves(offset: int) -> ir.Value:
        at = builder.add(block, I64(offset))
        return widen_ir(builder, load_ir(builder, at, ir.VectorType(I16, LANES)), "float16")

    def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return call_llvm(builder, f"llvm.fma.{suffix(floats.ir)}", floats.ir, [a, b, c])

    groups = groups_of(scheme)
    rows = sorted({row for row, _ in sums})
    scale = {row: broadcast(row, Record.SCALE, F32) for row in rows}
    for group in range(groups):
        minus_sum = {row: _minus_sum(builder, scheme, group, row, broadcast) for row in rows}
        dots = {
            (row, vector): DOT(builder, scheme.bits, zero_of(scheme), minus_sum[row])
            for row, vector in sums
        }
        for step in range(group * STEPS // groups, (group + 1) * STEPS // groups):
            codes = [_codes(builder, scheme, block, step, v) for v in range(VECTORS)]
            for row in rows:
                word = broadcast(row, Record.CODES + 4 * step, I32)
                x = builder.bitcast(word, BYTE_LANES)
                for vector in range(VECTORS):
                    dots[row, vector].add(codes[vector], x)
        scales_at = code_bytes(scheme) + group * PANEL * 2
        for vector in range(VECTORS):
            scale_w = halves(scales_at + vector * LANES * 2)
            for row in rows:
                products = builder.sitofp(dots[row, vector].sum(), floats.ir)
                scale_xw = builder.fmul(scale_w, scale[row])
                sums[row, vector] = fma(products, scale_xw, sums[row, vector])
    if scheme.has_minimum:
        for vector in range(VECTORS):
            minimum = halves(code_bytes(scheme) + (PANEL + vector * LANES) * 2)
            for row in rows:
                scaled_sum = broadcast(row, Record.SCALED_SUM, F32)
                sums[row, vector] = fma(minimum, scaled_sum, sums[row, vector])


def _minus_sum(
    builder: ir.IRBuilder, scheme: Scheme, group: int, row: int, broadcast: _Broadcast
) -> ir.Value:
    """Of the activations of a group: the whole record, or one of its halves."""
    if groups_of(scheme) == 1:
        return broadcast(row, Record.MINUS_SUM, I32)
    first = broadcast(row, Record.MINUS_FIRST, I32)
    return first if group == 0 else builder.sub(broadcast(row, Record.MINUS_SUM, I32), first)


def _codes(
    builder: ir.IRBuilder, scheme: Scheme, block: ir.Value, step: int, vector: int
) -> ir.Value:
    """The codes of four inputs of LANES outputs, a byte each."""

    def line(first: int, index: int) -> ir.Value:
        offset = first + (index * PANEL + vector * LANES) * 4
        return load_ir(builder, builder.add(block, I64(offset)), WORDS)

    def masked(words: ir.Value, mask: int) -> ir.Value:
        return builder.and_(words, constant(WORDS, mask * 0x01010101))

    if scheme.bits == 8:
        return builder.bitcast(line(0, step), BYTE_LANES)
    low = line(0, step % 4)
    if step >= 4:
        low = builder.lshr(low, constant(WORDS, 4))
    low = masked(low, 0x0F)
    if scheme.bits == 6:
        high = line(PANEL * BLOCK // 2, step % 2)
        shift = 4 - 2 * (step // 2)
        if shift > 0:
            high = builder.shl(high, constant(WORDS, shift))
        elif shift < 0:
            high = builder.lshr(high, constant(WORDS, -shift))
        low = builder.or_(low, masked(high, 0x30))
    return builder.bitcast(low, BYTE_LANES)


@emits(types.int64)
def tile_buffer(builder: ir.IRBuilder, _arguments: Sequence[ir.Value]) -> ir.Value:
    """Address of float32 [TILE_ROWS][PANEL] in the caller's frame."""
    buffer = cgutils.alloca_once(builder, ir.ArrayType(floats.ir, TILE_ROWS * VECTORS))
    return builder.ptrtoint(buffer, I64)


@emits(types.void, types.int64, types.int64)
def quantize_block(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
    """(x, record): write the record of 32 float32 of one row.

    scale = max |x| / 127, codes the nearest integers to x / scale. Where x is not finite, neither
    is the scale.
    """
    address, record = arguments
    values, words = ir.VectorType(F32, BLOCK), ir.VectorType(I32, BLOCK)
    x = load_ir(builder, address, values)
    # As integers, magnitudes are in the order of the floats, and NaN above them all.
    magnitudes = builder.and_(builder.bitcast(x, words), constant(words, 0x7FFFFFFF))
    name = f"llvm.vector.reduce.umax.{suffix(words)}"
    largest = builder.bitcast(call_llvm(builder, name, I32, [magnitudes]), F32)
    scale = builder.fdiv(largest, F32(127.0))
    is_zero = builder.fcmp_ordered("==", largest, F32(0.0))
    inverse = builder.select(is_zero, F32(0.0), builder.fdiv(F32(127.0), largest))
    scaled = builder.fmul(x, splat_ir(builder, inverse, BLOCK))
    for bound, comparison in ((-127.0, ">"), (127.0, "<")):  # NaN becomes -127
        limit = constant(values, bound)
        scaled = builder.select(builder.fcmp_ordered(comparison, scaled, limit), scaled, limit)
    nearest = call_llvm(builder, f"llvm.rint.{suffix(values)}", values, [scaled])
    codes = builder.fptosi(nearest, words)

    def total(first: int) -> ir.Value:
        half = ir.VectorType(I32, BLOCK // 2)
        places = ir.Constant(half, list(range(first, first + BLOCK // 2)))
        part = builder.shuffle_vector(codes, ir.Constant(words, ir.Undefined), places)
        return call_llvm(builder, f"llvm.vector.reduce.add.{suffix(half)}", I32, [part])

    first_sum = total(0)
    whole_sum = builder.add(first_sum, total(BLOCK // 2))
    for offset, value in (
        (Record.CODES, builder.trunc(codes, ir.VectorType(I8, BLOCK))),
        (Record.SCALE, scale),
        (Record.SCALED_SUM, builder.fmul(scale, builder.sitofp(whole_sum, F32))),
        (Record.MINUS_SUM, builder.neg(whole_sum)),
        (Record.MINUS_FIRST, builder.neg(first_sum)),
    ):
        store_ir(builder, value, builder.add(record, I64(offset)))


@emits(types.float32, types.int64)
def load_half(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """One float16, widened."""
    return builder.fpext(load_ir(builder, arguments[0], F16), F32)
