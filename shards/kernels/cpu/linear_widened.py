"""Linear layers of float32 activations whose weights are quantised codes, widened in registers.

What the dequantised weights would give, but for the rounding of float32. The result of a row
depends on that row alone; `shards/kernels/cpu/widened_tiles.py` has the order of its sums.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import torch

from shards.kernels.cpu.checks import check_pair
from shards.kernels.cpu.integer_panels import (
    PANEL,
    SCHEMES,
    PackedQuantized,
    block_bytes,
)
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.linear_quantized import finish
from shards.kernels.cpu.simd import load_i64
from shards.kernels.cpu.widened_tiles import TILE_ROWS, tile_buffer, widening_tile
from shards.quantization.scheme import BLOCK, Scheme

# Activations that stay in the second-level cache while every panel of weights meets them.
_CACHED_BYTES: Final = 256 << 10


class _Multiply(IntEnum):
    """Operands; addresses unless said otherwise."""

    ROWS = 0  # field of the header
    X = 1  # float32
    X_BYTES = 2  # bytes from row to row
    BLOCKS = 3  # number
    WEIGHTS = 4
    OUTPUTS = 5  # number
    Y = 6  # float32
    Y_BYTES = 7  # bytes from row to row
    BIAS = 8  # float32, whole panels; or 0
    ADD = 9  # 1 where y is added to
    CACHED_ROWS = 10  # rows that meet all weights before the next do


def _multiply(scheme: Scheme) -> Kernel:
    bytes_of_block = block_bytes(scheme)
    tile = widening_tile(scheme)

    def multiply(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        """The step's rows by a thread's share of the panels."""
        rows = load_i64(step + 8 * operand(operands, _Multiply.ROWS))
        x, x_bytes = operand(operands, _Multiply.X), operand(operands, _Multiply.X_BYTES)
        weights, blocks = operand(operands, _Multiply.WEIGHTS), operand(operands, _Multiply.BLOCKS)
        outputs = operand(operands, _Multiply.OUTPUTS)
        y, y_bytes = operand(operands, _Multiply.Y), operand(operands, _Multiply.Y_BYTES)
        bias, add = operand(operands, _Multiply.BIAS), operand(operands, _Multiply.ADD)
        cached = operand(operands, _Multiply.CACHED_ROWS)
        out = tile_buffer()
        first, last = share(outputs, PANEL, thread, threads)
        for start in range(0, rows, cached):
            count = min(cached, rows - start)
            tiles = -(-count // TILE_ROWS)
            for output in range(first, last, PANEL):
                panel = weights + output // PANEL * blocks * bytes_of_block
                panel_bias = bias + 4 * output if bias != 0 else 0
                for i in range(tiles):
                    row, end = start + count * i // tiles, start + count * (i + 1) // tiles
                    tile(end - row, blocks, panel, x + row * x_bytes, x_bytes, out)
                    at = y + row * y_bytes + 4 * output
                    finish(out, end - row, at, y_bytes, panel_bias, add, outputs - output)
        return 0

    return Kernel(multiply)


_MULTIPLY: Final = {scheme: _multiply(scheme) for scheme in SCHEMES}


def linear(
    packed: PackedQuantized,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: Header = Header.ROWS,
    add: bool = False,
) -> tuple[Instruction, ...]:
    """y[r] = x[r] W^T (+ bias) (+ y[r] with `add`) for every row below the header's `rows`.

    `x` float32 [rows, inputs] and `y` float32 [rows, outputs] may be slices of wider buffers along
    their columns; `bias` floats [outputs], as it is now. Raises `ValueError` for other shapes.
    """
    check_pair(x, y, bias, inputs=packed.inputs, outputs=packed.outputs)
    if bias is not None:
        bias = torch.nn.functional.pad(bias.float(), (0, -len(bias) % PANEL))
    cached = max(1, _CACHED_BYTES // (4 * packed.inputs * TILE_ROWS)) * TILE_ROWS
    operands = {
        _Multiply.ROWS: rows,
        _Multiply.X: x.data_ptr(),
        _Multiply.X_BYTES: 4 * x.stride(0),
        _Multiply.BLOCKS: packed.inputs // BLOCK,
        _Multiply.WEIGHTS: packed.panels.data_ptr(),
        _Multiply.OUTPUTS: packed.outputs,
        _Multiply.Y: y.data_ptr(),
        _Multiply.Y_BYTES: 4 * y.stride(0),
        _Multiply.BIAS: 0 if bias is None else bias.data_ptr(),
        _Multiply.ADD: int(add),
        _Multiply.CACHED_ROWS: cached,
    }
    kernel = _MULTIPLY[packed.scheme]
    return (Instruction(kernel, tuple(operands[name] for name in _Multiply), (packed, x, y, bias)),)
