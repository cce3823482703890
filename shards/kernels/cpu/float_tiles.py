"""Register tiles of a float matmul: a few rows by a few outputs, as LLVM IR.

Weights lie in panels: PANEL outputs side by side, a run of PANEL weights for every input,
[inputs][PANEL]. So whoever walks panels reads one stream of memory. A tile holds its sums, rows x
outputs of a panel, in registers while it walks the inputs. Each sum is one chain of fused
multiply-adds in the order of the inputs, so an output has the same bits in whatever tile, and on
whatever width of vectors, it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils

from shards.kernels.cpu.emission import (
    BYTES,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    REGISTERS,
    call_llvm,
    emits,
    load_ir,
    splat_ir,
    store_ir,
    suffix,
    widen_ir,
)
from shards.kernels.cpu.simd import floats

PANEL: Final = 4 * LANES
_LINE: Final = 64  # bytes of a cache line
_STORED: Final = {"float32": F32, "bfloat16": I16, "float16": I16}


def _fits(rows: int, width: int) -> bool:
    """Whether the sums stay in registers, with one side of the product and one of the other."""
    vectors = width // LANES
    return rows * vectors + min(rows, vectors) + 1 <= REGISTERS


# Rows of the tile that large matmuls are made of: half a panel across, where two vectors share
# each activation. Fewer rows take a whole panel, to have as many chains hide the latency of a
# multiply-add.
TILE_ROWS: Final = max(rows for rows in range(1, REGISTERS) if _fits(rows, PANEL // 2))
TILE_WIDTHS: Final = (
    0,
    *(PANEL if _fits(rows, PANEL) else PANEL // 2 for rows in range(1, TILE_ROWS + 1)),
)


@emits(types.int64)
def spare_tile(builder: ir.IRBuilder, _arguments: Sequence[ir.Value]) -> ir.Value:
    """Address of room on the stack for the sums of any tile."""
    size = max(rows * width for rows, width in enumerate(TILE_WIDTHS))
    return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(F32, size)), I64)


def _tiles(kind: str) -> Any:
    @emits(types.void, *[types.int64] * 8)
    def tile(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        """Add `inputs` products to each y of `rows` rows and TILE_WIDTHS[rows] outputs.

        (rows, inputs, weights, ahead, x, x_stride, y, y_stride), strides in bytes. The memory
        `ahead` bytes behind each weight is fetched into the second-level cache.
        """
        rows, *rest = arguments
        end = builder.append_basic_block("tile.end")
        impossible = builder.append_basic_block("tile.impossible")
        switch = builder.switch(rows, impossible)
        builder.position_at_end(impossible)
        builder.unreachable()
        for number in range(1, TILE_ROWS + 1):
            block = builder.append_basic_block(f"tile.{number}")
            switch.add_case(I64(number), block)
            builder.position_at_end(block)
            _emit(builder, kind, number, *rest)
            builder.branch(end)
        builder.position_at_end(end)

    return tile


def _emit(
    builder: ir.IRBuilder,
    kind: str,
    rows: int,
    inputs: ir.Value,
    weights: ir.Value,
    ahead: ir.Value,
    x: ir.Value,
    x_stride: ir.Value,
    y: ir.Value,
    y_stride: ir.Value,
) -> None:
    vector = ir.VectorType(_STORED[kind], LANES)
    size = 4 if kind == "float32" else 2
    width = TILE_WIDTHS[rows]
    columns = range(width // LANES)

    def rows_at(base: ir.Value, stride: ir.Value) -> list[ir.Value]:
        return [builder.add(base, builder.mul(stride, I64(row))) for row in range(rows)]

    x_at = rows_at(x, x_stride)
    y_at = [builder.add(at, I64(BYTES * c)) for at in rows_at(y, y_stride) for c in columns]
    before = [load_ir(builder, at, floats.ir) for at in y_at]

    entry = builder.block
    loop = builder.append_basic_block("tile.inputs")
    after = builder.append_basic_block("tile.sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    sums = [builder.phi(floats.ir) for _ in before]
    x_k = builder.mul(k, I64(4))
    w_k = builder.add(weights, builder.mul(k, I64(PANEL * size)))
    for line in range(0, width * size, _LINE):
        _prefetch(builder, builder.add(builder.add(w_k, ahead), I64(line)))

    def activation(row: int) -> ir.Value:
        return splat_ir(builder, load_ir(builder, builder.add(x_at[row], x_k), F32), LANES)

    def weight(column: int) -> ir.Value:
        at = builder.add(w_k, I64(column * LANES * size))
        return widen_ir(builder, load_ir(builder, at, vector), kind)

    totals: list[ir.Value] = list(sums)

    def multiply(row: int, column: int, x_value: ir.Value, w_value: ir.Value) -> None:
        i = row * len(columns) + column
        name = f"llvm.fma.{suffix(floats.ir)}"
        totals[i] = call_llvm(builder, name, floats.ir, [x_value, w_value, totals[i]])

    # The fewer of the two stay in registers for all of the others, which pass through one.
    if rows < len(columns):
        x_values = [activation(row) for row in range(rows)]
        for column in columns:
            w_value = weight(column)
            for row in range(rows):
                multiply(row, column, x_values[row], w_value)
    else:
        w_values = [weight(column) for column in columns]
        for row in range(rows):
            x_value = activation(row)
            for column in columns:
                multiply(row, column, x_value, w_values[column])

    following = builder.add(k, I64(1))
    for phi, first, then in zip((k, *sums), (I64(0), *before), (following, *totals), strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_signed("<", following, inputs), loop, after)
    builder.position_at_end(after)
    for at, total in zip(y_at, totals, strict=True):
        store_ir(builder, total, at)


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch the line at an address, which may be any, into the second-level cache."""
    read, second_level, data = I32(0), I32(2), I32(1)
    pointer = builder.inttoptr(address, I8.as_pointer())
    arguments = [pointer, read, second_level, data]
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def _weights(kind: str) -> Any:
    @emits(types.float32, types.int64)
    def weight(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
        """The weight at an address, widened."""
        alone = ir.VectorType(_STORED[kind], 1)
        value = widen_ir(builder, load_ir(builder, arguments[0], alone), kind)
        return builder.extract_element(value, I32(0))

    return weight


tile_float32, tile_bfloat16, tile_float16 = (_tiles(kind) for kind in _STORED)
weight_float32, weight_bfloat16, weight_float16 = (_weights(kind) for kind in _STORED)
