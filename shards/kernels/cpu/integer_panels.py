"""How quantised weights and activations lie in memory for integer dot products.

Weights: a panel is PANEL outputs side by side. It is a run of blocks, one per 32 inputs, each with
the codes, then the float16 scales of its outputs, then their minima. Four consecutive inputs of one
output lie in one 32-bit lane, so that a vector of codes meets one 32-bit word of activations, and
sums of products need no shuffles. A block's codes, of "steps" 0 to 7 of 4 inputs:

    8 bits  step after step, [8][PANEL][4 bytes], 128 added to each.
    4 bits  [4][PANEL][4 bytes]: step s in the low nibbles, step s + 4 in the high ones.
    6 bits  their low four bits as above; then [2][PANEL][4 bytes]: bits 2 i and 2 i + 1 of byte
            line j hold the high two of step 2 i + j.

Activations: int8 codes with a float32 scale per 32 inputs, in records (`Record`) that lie side by
side for TILE_ROWS rows, then the same rows' next 32 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch

from shards.kernels.cpu.emission import LANES, REGISTERS
from shards.quantization.packing import unpack
from shards.quantization.scheme import BLOCK, INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor

VECTORS: Final = 2
PANEL: Final = VECTORS * LANES
TILE_ROWS: Final = REGISTERS // (2 * VECTORS)  # sums of integers and of floats take all registers
STEPS: Final = BLOCK // 4
SCHEMES: Final = (INT8, INT6, INT4, INT4_MINIMUM)  # compiled code knows a scheme by its place
# Outputs that are repacked at a time: what bounds the memory between.
_PACKED_OUTPUTS: Final = 64 * PANEL

Allocate = Callable[[int], torch.Tensor]


class Record(IntEnum):
    """Byte offsets in the record of 32 inputs of one row."""

    CODES = 0  # 32 int8, -127 to 127
    SCALE = 32  # float32
    SCALED_SUM = 36  # float32, scale * (sum of the codes)
    MINUS_SUM = 40  # int32, -(sum of the codes)
    MINUS_FIRST = 44  # int32, -(sum of the first 16 codes)
    END = 48


def zero_of(scheme: Scheme) -> int:
    """The code of 0.0 as packed here: 0 or a power of two."""
    return 128 if scheme.bits == 8 else scheme.zero


def groups_of(scheme: Scheme) -> int:
    """Groups in a block: 1 or 2."""
    return BLOCK // scheme.group


def code_bytes(scheme: Scheme) -> int:
    """Of the codes of a block of PANEL outputs."""
    return PANEL * scheme.code_bytes(BLOCK)


def block_bytes(scheme: Scheme) -> int:
    """Of a block of PANEL outputs: 32 inputs' codes, scales and minima."""
    return scheme.bytes_of(PANEL, BLOCK)


def _allocate(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantized:
    """Weights [outputs, inputs], as uint8 [panels, blocks, bytes of a block]."""

    scheme: Scheme
    panels: torch.Tensor
    outputs: int

    @property
    def inputs(self) -> int:
        return self.panels.shape[1] * BLOCK

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes


def pack_quantized(
    weights: Sequence[QuantizedTensor], allocate: Allocate = _allocate
) -> PackedQuantized:
    """Weights of one scheme with the same inputs, side by side along their outputs.

    `allocate` gives uint8 [bytes] on a cache line's border. Raises `ValueError` where schemes or
    inputs differ.
    """
    if len({(weight.scheme, weight.shape[1]) for weight in weights}) != 1:
        found = ", ".join(f"{weight.scheme.name} {list(weight.shape)}" for weight in weights)
        raise ValueError(f"weights side by side must be of one scheme and as wide, not: {found}")
    scheme, inputs = weights[0].scheme, weights[0].shape[1]
    outputs = sum(weight.shape[0] for weight in weights)
    shape = (-(-outputs // PANEL), inputs // BLOCK, block_bytes(scheme))
    packed = allocate(shape[0] * shape[1] * shape[2]).view(shape)
    for first in range(0, outputs, _PACKED_OUTPUTS):
        chunk = _rows_of(weights, first, min(first + _PACKED_OUTPUTS, outputs))
        of_chunk = _panels(chunk)
        start = first // PANEL
        packed[start : start + len(of_chunk)] = of_chunk
    return PackedQuantized(scheme, packed, outputs)


def _rows_of(weights: Sequence[QuantizedTensor], start: int, stop: int) -> QuantizedTensor:
    """The rows `start` to `stop` of all the weights, counted through."""
    chunk = QuantizedTensor.empty(weights[0].scheme, stop - start, weights[0].shape[1])
    before = 0
    for weight in weights:
        after = before + weight.shape[0]
        low, high = max(start, before), min(stop, after)
        if low < high:
            rows = weight.rows(low - before, high - before)
            chunk.rows(low - start, high - start).copy_(rows)
        before = after
    return chunk


def _panels(weight: QuantizedTensor) -> torch.Tensor:
    """uint8 [panels, blocks, bytes of a block]; outputs that fill up the last panel are 0."""
    scheme = weight.scheme
    missing = -weight.shape[0] % PANEL

    def by_panel(plane_OX: torch.Tensor, per_block: int) -> torch.Tensor:
        """[outputs, blocks * per_block] -> [panels, PANEL, blocks, per_block]"""
        padded = torch.nn.functional.pad(plane_OX, (0, 0, 0, missing))
        return padded.view(-1, PANEL, padded.shape[1] // per_block, per_block)

    codes_OI = unpack(weight.codes, scheme.bits)
    if scheme.bits == 8:
        codes_OI = codes_OI + zero_of(scheme)  # signed to unsigned, modulo 256
    blocks = by_panel(codes_OI, BLOCK)
    # [panels, blocks, steps, PANEL, 4]
    steps = blocks.view(*blocks.shape[:3], STEPS, 4).permute(0, 2, 3, 1, 4)
    planes = [steps]
    if scheme.bits < 8:
        low = steps & 0x0F
        planes = [low[:, :, : STEPS // 2] | low[:, :, STEPS // 2 :] << 4]
    if scheme.bits == 6:
        high = steps >> 4
        first, second, third, fourth = (high[:, :, i : i + 2] << i for i in range(0, STEPS, 2))
        planes.append(first | second | third | fourth)
    for plane in (weight.scales, weight.minima):
        if plane is not None:
            halves = by_panel(plane, groups_of(scheme)).permute(0, 2, 3, 1).contiguous()
            planes.append(halves.view(torch.uint8))
    return torch.cat([plane.flatten(2) for plane in planes], 2)
