"""Register tiles of a matmul of float32 activations by quantised weights, as LLVM IR.

Weights lie as `integer_panels` says, and are widened in registers. The products of a group of
inputs are summed first, in one chain of fused multiply-adds in the order of the inputs; the groups'
sums are joined by another such chain, times their scales. So an output has the same bits in
whatever tile, and on whatever width of vectors, it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils

from shards.kernels.cpu.emission import (
    BYTES,
    F32,
    I16,
    I32,
    I64,
    LANES,
    REGISTERS,
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
from shards.kernels.cpu.integer_dot import BYTE_LANES, WORDS
from shards.kernels.cpu.integer_panels import (
    PANEL,
    STEPS,
    VECTORS,
    block_bytes,
    code_bytes,
    groups_of,
    zero_of,
)
from shards.kernels.cpu.simd import floats
from shards.quantization.scheme import BLOCK, Scheme

# A tile's sums leave room for codes, for one input's weights widened, and for an activation.
TILE_ROWS: Final = (REGISTERS - 2 * VECTORS - 2) // VECTORS
# Sums that hide the latency of a multiply-add: a tile of fewer works on several blocks at once.
_CHAINS: Final = 4
# Rows of a tile in which AVX-512 widens 4 bits by table. In larger ones the multiply-adds wait for
# the port that the table takes.
_TABLE_ROWS: Final = 2
# Bytes ahead of the weights in use that memory is read: processors stop reading ahead at each page.
_AHEAD: Final = 12288
_LINE: Final = 64

_Cell = tuple[int, int, int]  # block, row, vector


def widening_tile(scheme: Scheme) -> Any:
    """A tile for weights of `scheme` and up to TILE_ROWS rows, to be called by compiled code."""

    @emits(types.void, *[types.int64] * 6)
    def tile(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        """(rows, blocks, weights, x, x_bytes, out): `out` float32 [rows][PANEL] = x W^T.

        `weights` is the address of a panel of so many blocks, `x_bytes` lies between rows of x.
        """
        rows, *rest = arguments
        end = builder.append_basic_block("tile.end")
        impossible = builder.append_basic_block("tile.impossible")
        switch = builder.switch(rows, impossible)
        builder.position_at_end(impossible)
        builder.unreachable()
        for number in range(1, TILE_ROWS + 1):
            case = builder.append_basic_block(f"tile.{number}")
            switch.add_case(I64(number), case)
            builder.position_at_end(case)
            _Tile(builder, scheme, number, *rest).emit()
            builder.branch(end)
        builder.position_at_end(end)

    return tile


class _Tile:
    """Emits the tile of one number of rows."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        scheme: Scheme,
        rows: int,
        blocks: ir.Value,
        weights: ir.Value,
        x: ir.Value,
        x_bytes: ir.Value,
        out: ir.Value,
    ) -> None:
        self._builder, self._scheme, self._rows = builder, scheme, rows
        self._blocks, self._weights, self._out = blocks, weights, out
        self._x_at = [builder.add(x, builder.mul(x_bytes, I64(row))) for row in range(rows)]
        self._totals = {
            (row, vector): cgutils.alloca_once(builder, floats.ir)
            for row in range(rows)
            for vector in range(VECTORS)
        }

    def emit(self) -> None:
        builder = self._builder
        for total in self._totals.values():
            builder.store(constant(floats.ir, 0.0), total)
        together = max(1, _CHAINS // (len(self._totals) * groups_of(self._scheme)))
        whole = builder.mul(builder.udiv(self._blocks, I64(together)), I64(together))
        self._walk(I64(0), whole, together)
        if together > 1:
            self._walk(whole, self._blocks, 1)
        for (row, vector), total in self._totals.items():
            at = builder.add(self._out, I64(BYTES * (row * VECTORS + vector)))
            store_ir(builder, builder.load(total), at)

    def _walk(self, start: ir.Value, stop: ir.Value, together: int) -> None:
        """Add the blocks `start` to `stop` to the totals, so many at a time."""
        builder, scheme = self._builder, self._scheme
        groups = groups_of(scheme)
        with cgutils.for_range_slice(builder, start, stop, I64(together)) as (first, _):
            numbers = [builder.add(first, I64(i)) for i in range(together)]
            blocks = [
                builder.add(self._weights, builder.mul(number, I64(block_bytes(scheme))))
                for number in numbers
            ]
            x_at = [
                [builder.add(at, builder.mul(number, I64(4 * BLOCK))) for at in self._x_at]
                for number in numbers
            ]
            sums = [self._group(blocks, x_at, group) for group in range(groups)]
            for i, block in enumerate(blocks):
                for group in range(groups):
                    for vector in range(VECTORS):
                        scale = self._halves(block, group, vector)
                        scale = builder.fmul(scale, constant(floats.ir, 2.0**-24))
                        for row in range(self._rows):
                            self._add(row, vector, scale, sums[group][i, row, vector])
                if scheme.has_minimum:
                    x_sums = [self._sum(at) for at in x_at[i]]
                    for vector in range(VECTORS):
                        minimum = self._halves(block, groups, vector)
                        for row, x_sum in enumerate(x_sums):
                            self._add(row, vector, minimum, x_sum)

    def _group(
        self, blocks: Sequence[ir.Value], x_at: Sequence[Sequence[ir.Value]], group: int
    ) -> dict[_Cell, ir.Value]:
        """Sums of (code * 2^24) * x over one group of each block."""
        builder, groups = self._builder, groups_of(self._scheme)
        entry = builder.block
        loop = builder.append_basic_block("group.steps")
        after = builder.append_basic_block("group.sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(I64)
        before = {
            (i, row, vector): builder.phi(floats.ir)
            for i in range(len(blocks))
            for row, vector in self._totals
        }
        self._read_ahead(blocks, step)
        sums: dict[_Cell, ir.Value] = dict(before)
        for i, block in enumerate(blocks):
            self._step(sums, i, block, x_at[i], step)
        following = builder.add(step, I64(1))
        step.add_incoming(I64(group * STEPS // groups), entry)
        step.add_incoming(following, loop)
        for cell, phi in before.items():
            phi.add_incoming(constant(floats.ir, 0.0), entry)
            phi.add_incoming(sums[cell], loop)
        last = I64((group + 1) * STEPS // groups)
        builder.cbranch(builder.icmp_unsigned("<", following, last), loop, after)
        builder.position_at_end(after)
        return sums

    def _step(
        self,
        sums: dict[_Cell, ir.Value],
        i: int,
        block: ir.Value,
        x_at: Sequence[ir.Value],
        step: ir.Value,
    ) -> None:
        """Add the products of four inputs to the sums of block `i`."""
        builder = self._builder
        weights = [self._weights_of(block, step, vector) for vector in range(VECTORS)]
        for byte in range(4):
            offset = builder.add(builder.mul(step, I64(16)), I64(4 * byte))
            widened = [weight(byte) for weight in weights]
            for row, at in enumerate(x_at):
                value = load_ir(builder, builder.add(at, offset), F32)
                x = splat_ir(builder, value, LANES)
                for vector, weight in enumerate(widened):
                    sums[i, row, vector] = self._fma(x, weight, sums[i, row, vector])
            if LANES == 16 and self._rows > 1:
                for cell, total in sums.items():
                    sums[cell] = _in_order(builder, total)

    def _read_ahead(self, blocks: Sequence[ir.Value], step: ir.Value) -> None:
        """Of what one step of all the blocks takes of the memory that they lie in."""
        builder = self._builder
        size = len(blocks) * block_bytes(self._scheme) // STEPS
        lines = max(1, round(size / _LINE))
        at = builder.add(blocks[0], builder.mul(step, I64(size)))
        for line in range(lines):
            prefetch_ir(builder, builder.add(at, I64(_AHEAD + line * size // lines)))

    def _weights_of(
        self, block: ir.Value, step: ir.Value, vector: int
    ) -> Callable[[int], ir.Value]:
        """A step's weights of LANES outputs: place of the input in the step -> code * 2^24."""
        builder, scheme = self._builder, self._scheme

        def line(first: int, index: ir.Value) -> ir.Value:
            at = builder.add(block, builder.mul(index, I64(4 * PANEL)))
            return load_ir(builder, builder.add(at, I64(first + vector * BYTES)), WORDS)

        if scheme.bits == 8:
            return partial(self._from_bytes, self._signed(line(0, step)))
        low = self._shifted(line(0, builder.and_(step, I64(3))), step, 4)
        if scheme.bits == 4 and LANES == 16 and self._rows <= _TABLE_ROWS:
            return partial(self._from_table, low)
        codes = builder.and_(low, constant(WORDS, 0x0F0F0F0F))
        if scheme.bits == 6:
            high = line(PANEL * BLOCK // 2, builder.and_(step, I64(1)))
            high = builder.and_(self._shifted(high, step, 6), constant(WORDS, 0x03030303))
            codes = builder.or_(codes, builder.shl(high, constant(WORDS, 4)))
        return partial(self._from_bytes, self._signed(codes))

    def _shifted(self, words: ir.Value, step: ir.Value, mask: int) -> ir.Value:
        """Words shifted right by `step & mask`.

        The counts, one for each lane, come from a table: by one count for all lanes, processors
        shift more slowly.
        """
        builder = self._builder
        counts = [constant(WORDS, number & mask) for number in range(STEPS)]
        table = ir.Constant(ir.ArrayType(WORDS, STEPS), counts)
        pointer = cgutils.global_constant(builder, "shifts", table)
        return builder.lshr(words, builder.load(builder.gep(pointer, [I64(0), step])))

    def _signed(self, codes: ir.Value) -> ir.Value:
        zero = constant(BYTE_LANES, zero_of(self._scheme))
        return self._builder.sub(self._builder.bitcast(codes, BYTE_LANES), zero)

    def _from_bytes(self, codes: ir.Value, byte: int) -> ir.Value:
        """code * 2^24: a byte at the top of its word keeps its sign."""
        builder, none = self._builder, 4 * LANES
        places = [at for lane in range(LANES) for at in (none, none, none, 4 * lane + byte)]
        mask = ir.Constant(ir.VectorType(I32, len(places)), places)
        words = builder.shuffle_vector(codes, constant(BYTE_LANES, 0), mask)
        return builder.sitofp(builder.bitcast(words, WORDS), floats.ir)

    def _from_table(self, low: ir.Value, byte: int) -> ir.Value:
        """code * 2^24: vpermps picks one of 16 floats by the low four bits of a lane."""
        builder, zero = self._builder, zero_of(self._scheme)
        table = ir.Constant(floats.ir, [(code - zero) * 2.0**24 for code in range(16)])
        words = builder.lshr(low, constant(WORDS, 8 * byte))
        return call_llvm(builder, "llvm.x86.avx512.permvar.sf.512", floats.ir, [table, words])

    def _halves(self, block: ir.Value, group: int, vector: int) -> ir.Value:
        """Scales of a group, or the minima behind all groups'."""
        builder = self._builder
        offset = code_bytes(self._scheme) + 2 * (group * PANEL + vector * LANES)
        at = builder.add(block, I64(offset))
        return widen_ir(builder, load_ir(builder, at, ir.VectorType(I16, LANES)), "float16")

    def _sum(self, x: ir.Value) -> ir.Value:
        """The sum of a block of activations in every lane: halves are added until one is left."""
        builder = self._builder
        value = load_ir(builder, x, ir.VectorType(F32, BLOCK))
        while value.type.count > 1:
            half = value.type.count // 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(
                    value,
                    undefined,
                    ir.Constant(ir.VectorType(I32, half), list(range(start, start + half))),
                )
                for start in (0, half)
            )
            value = builder.fadd(low, high)
        return splat_ir(builder, builder.extract_element(value, I32(0)), LANES)

    def _add(self, row: int, vector: int, scale: ir.Value, value: ir.Value) -> None:
        total = self._totals[row, vector]
        self._builder.store(self._fma(scale, value, self._builder.load(total)), total)

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = f"llvm.fma.{suffix(floats.ir)}"
        return call_llvm(self._builder, name, floats.ir, [a, b, c])


def _in_order(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same value, computed before memory is read again.

    LLVM would load activations early, as if there were registers for them, and spill. It took as
    many to be free on AVX-512 alone, whose registers "v" stands for.
    """
    signature = ir.FunctionType(value.type, [value.type])
    return builder.asm(signature, "", "=v,0,~{memory}", [value], side_effect=True)


@emits(types.int64)
def tile_buffer(builder: ir.IRBuilder, _arguments: Sequence[ir.Value]) -> ir.Value:
    """Address of float32 [TILE_ROWS][PANEL] in the caller's frame."""
    buffer = cgutils.alloca_once(builder, ir.ArrayType(floats.ir, TILE_ROWS * VECTORS))
    return builder.ptrtoint(buffer, I64)
