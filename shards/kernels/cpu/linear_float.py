"""Linear layers and embeddings over float weights: packed panels, sums in float32.

Every output is one chain of fused multiply-adds: it starts from 0 (the bias, what `y` held) and
goes through the inputs in order, whatever the number of rows, the tile or the thread. So a row's
result has the same bits alone as in a batch.

Shape letters: O outputs, K inputs, P panels of PANEL outputs, R rows of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
import torch

from shards.kernels.cpu.checks import check_rows
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.float_tiles import (
    PANEL,
    TILE_ROWS,
    TILE_WIDTHS,
    spare_tile,
    tile_bfloat16,
    tile_float16,
    tile_float32,
    weight_bfloat16,
    weight_float16,
    weight_float32,
)
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.simd import (
    load_f32,
    load_i32,
    load_i64,
    load_part,
    splat,
    store_f32,
    store_part,
)

# Inputs and outputs of the part that rows beyond one tile work on together: its weights, at most
# 256 KB, stay in the second-level cache from one tile to the next.
_BLOCK: Final = 1024
_STRIP: Final = max(1, 64 // PANEL)  # panels
# Bytes ahead of the weights in use that memory is read.
_AHEAD: Final = 16384


def _anywhere(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True)
class PackedFloat:
    """Weights as panels_PKN, N = PANEL: `panels_PKN[o // N, k, o % N]` is weight [o, k].

    float32, bfloat16 or float16; outputs behind the last are 0.
    """

    panels_PKN: torch.Tensor
    outputs: int

    @property
    def inputs(self) -> int:
        return self.panels_PKN.shape[1]

    @property
    def nbytes(self) -> int:
        return self.panels_PKN.nbytes


def pack_float(
    weight_OK: torch.Tensor, allocate: Callable[[int], torch.Tensor] = _anywhere
) -> PackedFloat:
    """Pack weights, in their own dtype.

    `allocate(nbytes)` gives the uint8 tensor they come to lie in, aligned to 4 bytes. Raises
    ValueError if the weights are no matrix of float32, bfloat16 or float16.
    """
    if weight_OK.dtype not in _KERNELS or weight_OK.ndim != 2 or 0 in weight_OK.shape:
        raise ValueError(
            f"weight {list(weight_OK.shape)} of {weight_OK.dtype}: float linear layers take"
            " [outputs, inputs] of float32, bfloat16 or float16"
        )
    outputs, inputs = weight_OK.shape
    shape = (-(-outputs // PANEL), inputs, PANEL)
    storage = allocate(shape[0] * inputs * PANEL * weight_OK.itemsize)
    panels_PKN = storage.view(weight_OK.dtype).view(shape)
    whole, rest = divmod(outputs, PANEL)
    weight_PNK = weight_OK[: whole * PANEL].view(whole, PANEL, inputs)
    panels_PKN[:whole] = weight_PNK.transpose(1, 2)
    if rest:
        panels_PKN[whole] = 0
        panels_PKN[whole, :, :rest] = weight_OK[whole * PANEL :].T
    return PackedFloat(panels_PKN, outputs)


def linear(
    packed: PackedFloat,
    x_RK: torch.Tensor,
    y_RO: torch.Tensor,
    *,
    bias_O: torch.Tensor | None = None,
    rows: Header = Header.ROWS,
    add: bool = False,
) -> tuple[Instruction, ...]:
    """y = x W^T (+ bias) (+ y, with `add`) for as many rows as the field `rows` of the header says.

    x and y are float32 and do not overlap; either may be columns of a wider buffer. Raises
    ValueError for buffers of another shape or dtype.
    """
    check_rows("x", x_RK, packed.inputs)
    check_rows("y", y_RO, packed.outputs)
    if bias_O is not None:
        if bias_O.shape != (packed.outputs,):
            raise ValueError(f"bias {list(bias_O.shape)}: must be [{packed.outputs}]")
        bias_O = bias_O.float().contiguous()
    operands = (
        packed.panels_PKN.data_ptr(),
        packed.inputs,
        packed.outputs,
        x_RK.data_ptr(),
        x_RK.stride(0) * 4,
        y_RO.data_ptr(),
        y_RO.stride(0) * 4,
        0 if bias_O is None else bias_O.data_ptr(),
        int(add),
        rows,
    )
    kernel = _KERNELS[packed.panels_PKN.dtype].linear
    return (Instruction(kernel, operands, (packed, x_RK, y_RO, bias_O)),)


def embed(
    packed: PackedFloat, tokens_R: torch.Tensor, x_RK: torch.Tensor, *, first: int = 0
) -> tuple[Instruction, ...]:
    """x = the weights of output `token - first` for each row of the step, or 0 without such one.

    `tokens` are int32 or int64; x is float32. Raises ValueError for buffers of another shape or
    dtype.
    """
    check_rows("x", x_RK, packed.inputs)
    if tokens_R.dtype not in (torch.int32, torch.int64) or not tokens_R.is_contiguous():
        raise ValueError(f"tokens of {tokens_R.dtype}: must be contiguous int32 or int64")
    operands = (
        packed.panels_PKN.data_ptr(),
        packed.inputs,
        packed.outputs,
        tokens_R.data_ptr(),
        tokens_R.itemsize,
        first,
        x_RK.data_ptr(),
        x_RK.stride(0) * 4,
    )
    kernel = _KERNELS[packed.panels_PKN.dtype].embed
    return (Instruction(kernel, operands, (packed, tokens_R, x_RK)),)


@numba.njit
def _linear(tile: Any, size: Any, operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    """Operands as `linear` lists them; a thread has its share of the panels."""
    weights, inputs, outputs = operand(operands, 0), operand(operands, 1), operand(operands, 2)
    x, x_stride = operand(operands, 3), operand(operands, 4)
    y, y_stride = operand(operands, 5), operand(operands, 6)
    bias, add = operand(operands, 7), operand(operands, 8)
    rows = load_i64(step + 8 * operand(operands, 9))

    start, stop = share(-(-outputs // PANEL), 1, thread, threads)
    _begin(rows, start * PANEL, min(stop * PANEL, outputs), y, y_stride, bias, add)
    tiles = -(-rows // TILE_ROWS)
    block, strip = (inputs, max(1, stop - start)) if tiles <= 1 else (_BLOCK, _STRIP)
    for first in range(0, inputs, block):
        count = min(block, inputs - first)
        for left in range(start, stop, strip):
            right = min(left + strip, stop)
            for i in range(tiles):
                row, end = rows * i // tiles, rows * (i + 1) // tiles
                _sweep(
                    tile,
                    size,
                    _AHEAD if i == 0 else 0,
                    end - row,
                    count,
                    weights + first * PANEL * size,
                    inputs * PANEL * size,
                    left,
                    right,
                    x + row * x_stride + first * 4,
                    x_stride,
                    y + row * y_stride,
                    y_stride,
                    outputs,
                )
    return 0


@numba.njit
def _begin(rows: Any, start: Any, stop: Any, y: Any, y_stride: Any, bias: Any, add: Any) -> None:
    """What the sums of outputs `start` to `stop` start from."""
    if add and bias == 0:
        return
    zero = splat(np.float32(0))
    for row in range(rows):
        for output in range(start, stop, LANES):
            lanes = min(LANES, stop - output)
            at = y + row * y_stride + output * 4
            value = zero if bias == 0 else load_part(bias + output * 4, lanes)
            if add:
                value = value + load_part(at, lanes)
            store_part(at, value, lanes)


@numba.njit
def _sweep(
    tile: Any,
    size: Any,
    ahead: Any,
    rows: Any,
    inputs: Any,
    weights: Any,
    panel_stride: Any,
    left: Any,
    right: Any,
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    outputs: Any,
) -> None:
    """One tile's rows over the panels `left` to `right`."""
    width = TILE_WIDTHS[rows]
    for output in range(left * PANEL, min(right * PANEL, outputs), width):
        w = weights + output // PANEL * panel_stride + output % PANEL * size
        at, columns = y + output * 4, min(width, outputs - output)
        if columns == width:
            tile(rows, inputs, w, ahead, x, x_stride, at, y_stride)
        else:
            spare = spare_tile()
            _copy(rows, columns, at, y_stride, spare, width * 4)
            tile(rows, inputs, w, ahead, x, x_stride, spare, width * 4)
            _copy(rows, columns, spare, width * 4, at, y_stride)


@numba.njit
def _copy(
    rows: Any, columns: Any, source: Any, source_stride: Any, target: Any, target_stride: Any
) -> None:
    for row in range(rows):
        for column in range(columns):
            value = load_f32(source + row * source_stride + column * 4)
            store_f32(target + row * target_stride + column * 4, value)


@numba.njit
def _embed(weight: Any, size: Any, operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    """Operands as `embed` lists them; a thread has its share of the rows."""
    weights, inputs, outputs = operand(operands, 0), operand(operands, 1), operand(operands, 2)
    tokens, token_size, offset = operand(operands, 3), operand(operands, 4), operand(operands, 5)
    x, x_stride = operand(operands, 6), operand(operands, 7)
    start, stop = share(load_i64(step + 8 * Header.ROWS), 1, thread, threads)
    for row in range(start, stop):
        at = tokens + row * token_size
        output = (load_i64(at) if token_size == 8 else np.int64(load_i32(at))) - offset
        to = x + row * x_stride
        if 0 <= output < outputs:
            panel, column = divmod(output, PANEL)
            w = weights + (panel * inputs * PANEL + column) * size
            for k in range(inputs):
                store_f32(to + 4 * k, weight(w + k * PANEL * size))
        else:
            for k in range(inputs):
                store_f32(to + 4 * k, np.float32(0))
    return 0


# A kernel for each kind of weights, at the top level since Numba caches no closures.


def linear_float32(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _linear(tile_float32, 4, operands, step, thread, threads)


def linear_bfloat16(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _linear(tile_bfloat16, 2, operands, step, thread, threads)


def linear_float16(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _linear(tile_float16, 2, operands, step, thread, threads)


def embed_float32(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _embed(weight_float32, 4, operands, step, thread, threads)


def embed_bfloat16(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _embed(weight_bfloat16, 2, operands, step, thread, threads)


def embed_float16(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    return _embed(weight_float16, 2, operands, step, thread, threads)


@dataclass(frozen=True)
class _Kernels:
    linear: Kernel
    embed: Kernel


_KERNELS: Final = {
    torch.float32: _Kernels(Kernel(linear_float32), Kernel(embed_float32)),
    torch.bfloat16: _Kernels(Kernel(linear_bfloat16), Kernel(embed_bfloat16)),
    torch.float16: _Kernels(Kernel(linear_float16), Kernel(embed_float16)),
}
