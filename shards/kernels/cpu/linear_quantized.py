"""Linear layers and embeddings whose weights are quantised codes.

A step's activations are quantised to int8, 32 inputs of a row to a scale, as an instruction of its
own; products are integer dot products, which `shards/kernels/cpu/integer_tiles.py` explains. The
result of a row depends on that row alone.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import torch
from numba import njit

from shards.kernels.cpu.checks import check_pair, check_rows
from shards.kernels.cpu.emission import BYTES, LANES
from shards.kernels.cpu.integer_panels import (
    PANEL,
    SCHEMES,
    STEPS,
    TILE_ROWS,
    VECTORS,
    PackedQuantized,
    Record,
    block_bytes,
    code_bytes,
    groups_of,
    pack_quantized,
    zero_of,
)
from shards.kernels.cpu.integer_tiles import load_half, quantize_block, tile, tile_buffer
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import load, load_i64, load_part, load_u8, store, store_f32, store_part
from shards.quantization.scheme import BLOCK

__all__ = ["PackedQuantized", "embed", "linear", "pack_quantized", "scratch_bytes"]

# Quantised rows that stay in the second-level cache while every panel of weights meets them.
_ROWS_BYTES: Final = 256 << 10


def scratch_bytes(rows: int, inputs: int) -> int:
    """Of the records of at most `rows` rows."""
    return -(-rows // TILE_ROWS) * TILE_ROWS * (inputs // BLOCK) * Record.END


class _Quantize(IntEnum):
    """Operands; addresses unless said otherwise."""

    ROWS = 0  # field of the header
    X = 1  # float32
    X_BYTES = 2  # bytes from row to row
    BLOCKS = 3  # number
    RECORDS = 4


@njit
def _record(records: Any, blocks: Any, row: Any, block: Any) -> Any:
    tile, inside = divmod(row, TILE_ROWS)
    return records + ((tile * blocks + block) * TILE_ROWS + inside) * Record.END


def _quantize(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    """Write the records of the step's rows."""
    blocks = operand(operands, _Quantize.BLOCKS)
    rows = load_i64(step + 8 * operand(operands, _Quantize.ROWS))
    x, x_bytes = operand(operands, _Quantize.X), operand(operands, _Quantize.X_BYTES)
    records = operand(operands, _Quantize.RECORDS)
    first, last = share(rows * blocks, 1, thread, threads)
    for i in range(first, last):
        row, block = divmod(i, blocks)
        quantize_block(x + row * x_bytes + 4 * BLOCK * block, _record(records, blocks, row, block))
    return 0


class _Multiply(IntEnum):
    """Operands; addresses unless said otherwise."""

    ROWS = 0  # field of the header
    RECORDS = 1
    BLOCKS = 2  # number
    WEIGHTS = 3
    OUTPUTS = 4  # number
    Y = 5  # float32
    Y_BYTES = 6  # bytes from row to row
    BIAS = 7  # float32, whole panels; or 0
    ADD = 8  # 1 where y is added to
    CACHED_ROWS = 9  # rows that meet all weights before the next do, whole tiles


@njit
def finish(tile: Any, rows: Any, y: Any, y_bytes: Any, bias: Any, add: Any, outputs: Any) -> None:
    """y = tile (+ bias) (+ y) of a panel, of whose outputs there are `outputs`."""
    for row in range(rows):
        for vector in range(VECTORS):
            offset, left = vector * BYTES, outputs - vector * LANES
            at = y + row * y_bytes + offset
            total = load(tile + (row * VECTORS + vector) * BYTES)
            if bias != 0:
                total = total + load(bias + offset)
            if left >= LANES:
                if add:
                    total = total + load(at)
                store(at, total)
            elif left > 0:
                if add:
                    total = total + load_part(at, left)
                store_part(at, total, left)


def _multiply(scheme: int) -> Kernel:
    bytes_of_block = block_bytes(SCHEMES[scheme])

    def multiply(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        """The step's rows by a thread's share of the panels."""
        rows = load_i64(step + 8 * operand(operands, _Multiply.ROWS))
        records, blocks = operand(operands, _Multiply.RECORDS), operand(operands, _Multiply.BLOCKS)
        weights, outputs = (
            operand(operands, _Multiply.WEIGHTS),
            operand(operands, _Multiply.OUTPUTS),
        )
        y, y_bytes = operand(operands, _Multiply.Y), operand(operands, _Multiply.Y_BYTES)
        bias, add = operand(operands, _Multiply.BIAS), operand(operands, _Multiply.ADD)
        cached = operand(operands, _Multiply.CACHED_ROWS)
        out = tile_buffer()
        first, last = share(outputs, PANEL, thread, threads)
        for start in range(0, rows, cached):
            stop = min(start + cached, rows)
            for output in range(first, last, PANEL):
                panel = weights + output // PANEL * blocks * bytes_of_block
                row = start
                while row < stop:
                    record = _record(records, blocks, row, 0)
                    left = stop - row
                    if left >= TILE_ROWS:
                        count = TILE_ROWS
                        tile(scheme, TILE_ROWS, panel, record, out, blocks)
                    elif left >= 4:
                        count = 4
                        tile(scheme, 4, panel, record, out, blocks)
                    elif left >= 2:
                        count = 2
                        tile(scheme, 2, panel, record, out, blocks)
                    else:
                        count = 1
                        tile(scheme, 1, panel, record, out, blocks)
                    at = y + row * y_bytes + 4 * output
                    panel_bias = bias + 4 * output if bias != 0 else 0
                    finish(out, count, at, y_bytes, panel_bias, add, outputs - output)
                    row += count
        return 0

    return Kernel(multiply)


class _Embed(IntEnum):
    """Operands; addresses unless said otherwise."""

    TOKENS = 0  # int64
    FIRST = 1  # the token of the first row
    WEIGHTS = 2
    OUTPUTS = 3  # number of rows
    BLOCKS = 4  # number
    X = 5  # float32
    X_BYTES = 6  # bytes from row to row


@njit
def _code(block: Any, bits: Any, step: Any, byte: Any) -> Any:
    """Of byte `byte` of a line of 4 PANEL bytes; compiled for a constant `bits`."""
    if bits == 8:
        return load_u8(block + 4 * PANEL * step + byte)
    half, line = divmod(step, STEPS // 2)
    code = (load_u8(block + 4 * PANEL * line + byte) >> (4 * half)) & 0x0F
    if bits == 6:
        shift, line = divmod(step, 2)
        high = load_u8(block + 4 * PANEL * (STEPS // 2 + line) + byte)
        code |= ((high >> (2 * shift)) & 3) << 4
    return code


def _embed(scheme: int) -> Kernel:
    chosen = SCHEMES[scheme]
    bits, groups, has_minimum = chosen.bits, groups_of(chosen), chosen.has_minimum
    zero = zero_of(chosen)
    bytes_of_block, scales_at = block_bytes(chosen), code_bytes(chosen)

    def embed(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        """x[r] = the row of token r, dequantised; 0 where the rank does not own it."""
        rows = load_i64(step + 8 * Header.ROWS)
        tokens, first_token = operand(operands, _Embed.TOKENS), operand(operands, _Embed.FIRST)
        weights, owned = operand(operands, _Embed.WEIGHTS), operand(operands, _Embed.OUTPUTS)
        blocks = operand(operands, _Embed.BLOCKS)
        first, last = share(rows, 1, thread, threads)
        for r in range(first, last):
            x = operand(operands, _Embed.X) + r * operand(operands, _Embed.X_BYTES)
            row = load_i64(tokens + 8 * r) - first_token
            if row < 0 or row >= owned:
                for i in range(blocks * BLOCK):
                    store_f32(x + 4 * i, 0.0)
                continue
            panel, lane = divmod(row, PANEL)
            for b in range(blocks):
                block = weights + (panel * blocks + b) * bytes_of_block
                scales = block + scales_at + 2 * lane
                for i in range(BLOCK):
                    group = i * groups // BLOCK
                    code = int(_code(block, bits, i // 4, 4 * lane + i % 4)) - zero
                    value = float(code) * load_half(scales + 2 * PANEL * group)
                    if has_minimum:
                        value += load_half(scales + 2 * PANEL * groups)
                    store_f32(x + 4 * (b * BLOCK + i), value)
        return 0

    return Kernel(embed)


_QUANTIZE: Final = Kernel(_quantize)
_MULTIPLY: Final = {scheme: _multiply(i) for i, scheme in enumerate(SCHEMES)}
_EMBED: Final = {scheme: _embed(i) for i, scheme in enumerate(SCHEMES)}


def linear(
    packed: PackedQuantized,
    x: torch.Tensor,
    y: torch.Tensor,
    scratch: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: Header = Header.ROWS,
    add: bool = False,
) -> tuple[Instruction, ...]:
    """y[r] = x[r] W^T (+ bias) (+ y[r] with `add`) for every row below the header's `rows`.

    `x` float32 [rows, inputs] and `y` float32 [rows, outputs] may be slices of wider buffers along
    their columns; `scratch` is uint8 [scratch_bytes(rows, inputs)] at least, which other layers
    may use in turn; `bias` floats [outputs], as it is now.
    Raises `ValueError` where a shape or dtype does not fit.
    """
    check_pair(x, y, bias, inputs=packed.inputs, outputs=packed.outputs)
    needed = scratch_bytes(len(x), packed.inputs)
    if scratch.nbytes < needed:
        raise ValueError(f"scratch of {scratch.nbytes} bytes is too small: give {needed}")
    blocks = packed.inputs // BLOCK
    of_tile = TILE_ROWS * blocks * Record.END
    bias_padded = None if bias is None else _padded(bias)
    quantize = (rows, x.data_ptr(), 4 * x.stride(0), blocks, scratch.data_ptr())
    multiply = (
        rows,
        scratch.data_ptr(),
        blocks,
        packed.panels.data_ptr(),
        packed.outputs,
        y.data_ptr(),
        4 * y.stride(0),
        0 if bias_padded is None else bias_padded.data_ptr(),
        int(add),
        max(1, _ROWS_BYTES // of_tile) * TILE_ROWS,
    )
    return (
        Instruction(_QUANTIZE, quantize, (x, scratch)),
        Instruction(_MULTIPLY[packed.scheme], multiply, (scratch, packed, y, bias_padded)),
    )


def embed(
    packed: PackedQuantized, tokens: torch.Tensor, x: torch.Tensor, first: int
) -> tuple[Instruction, ...]:
    """x[r] = row (tokens[r] - first) of the weights, zeros where it is not one of them.

    `tokens` int64 [rows], `x` float32 [rows, inputs]; for every row of the step.
    Raises `ValueError` where a shape or dtype does not fit.
    """
    check_rows("x", x, packed.inputs)
    if tokens.dtype != torch.int64 or tokens.shape != (len(x),) or tokens.stride(0) != 1:
        raise ValueError(f"tokens must be int64 [{len(x)}], contiguous, not {_described(tokens)}")
    operands = (
        tokens.data_ptr(),
        first,
        packed.panels.data_ptr(),
        packed.outputs,
        packed.inputs // BLOCK,
        x.data_ptr(),
        4 * x.stride(0),
    )
    return (Instruction(_EMBED[packed.scheme], operands, (tokens, packed, x)),)


def _padded(bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(bias.float(), (0, -len(bias) % PANEL))


def _described(matrix: torch.Tensor) -> str:
    return f"{matrix.dtype} {list(matrix.shape)} with strides {list(matrix.stride())}"
