"""GGUF's quantised blocks in the schemes of `shards/quantization/scheme.py`, code for code.

The layouts are those of ggml's block structs (ggml-common.h), little-endian, of 32 weights or,
for the K-quants, of 256 in 8 or 16 groups. Tests hold every type equal to gguf's own
dequantisation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from shards.quantization.packing import pack
from shards.quantization.scheme import GGUF_SCHEMES
from shards.quantization.tensor import QuantizedTensor

Bytes = npt.NDArray[np.uint8]
# Packed codes [blocks, bytes], scales and minima [blocks, groups], of `blocks` blocks.
Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def lower(encoded: Bytes, dtype: str) -> QuantizedTensor:
    """`encoded` [rows, bytes] holds whole blocks of `dtype`, a key of `GGUF_SCHEMES`.

    What float16 cannot hold of a K-quant's products comes out as an infinite scale or minimum.
    """
    rows = len(encoded)
    lowering, block_bytes = _LOWERINGS[dtype]
    codes, scales, minima = lowering(encoded.reshape(-1, block_bytes))
    return QuantizedTensor(
        GGUF_SCHEMES[dtype],
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        None if minima is None else minima.reshape(rows, -1),
    )


def _q8_0(blocks: Bytes) -> Planes:
    """float16 scale, 32 signed codes."""
    return torch.from_numpy(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _q4_0(blocks: Bytes) -> Planes:
    """float16 scale, 16 bytes of codes."""
    return torch.from_numpy(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> Planes:
    """float16 scale, float16 minimum, 16 bytes of codes."""
    return torch.from_numpy(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: Bytes) -> Planes:
    """float16 scale of the scales, float16 scale of the minima, 12 bytes with the 6-bit scales and
    minima of 8 groups, 128 bytes of codes: byte j of 32 holds a group's in the low nibble and the
    next group's in the high one."""
    scale, minimum = _halves(blocks[:, :2]).float(), _halves(blocks[:, 2:4]).float()
    packed = torch.from_numpy(blocks[:, 4:16])
    low, middle, high = packed.chunk(3, 1)
    scales = torch.cat((low & 0x3F, high & 0x0F | (low >> 2) & 0x30), 1)
    minima = torch.cat((middle & 0x3F, high >> 4 | (middle >> 2) & 0x30), 1)
    pairs = torch.unflatten(torch.from_numpy(blocks[:, 16:]), 1, (4, 1, 32))
    codes = torch.cat((pairs & 0x0F, pairs >> 4), 2)
    return pack(codes.flatten(1), 4), (scale * scales).half(), (-minimum * minima).half()


def _q6_k(blocks: Bytes) -> Planes:
    """128 bytes with the low four bits of the codes, 64 with the high two, 16 signed 8-bit scales,
    the float16 scale of these. Of each 128 weights, the low bits are 64 low then 64 high nibbles,
    the high bits four times 32 pairs, from the lowest bits up."""
    low = torch.unflatten(torch.from_numpy(blocks[:, :128]), 1, (2, 1, 64))
    high = torch.unflatten(torch.from_numpy(blocks[:, 128:192]), 1, (2, 1, 32))
    codes = torch.cat((low & 0x0F, low >> 4), 2).flatten(1)
    codes |= torch.cat([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], 2).flatten(1)
    scales = torch.from_numpy(blocks[:, 192:208]).view(torch.int8)
    return pack(codes, 6), (_halves(blocks[:, 208:]).float() * scales).half(), None


def _halves(two_bytes: Bytes) -> torch.Tensor:
    """uint8 [blocks, 2] -> float16 [blocks, 1]."""
    return torch.from_numpy(two_bytes.copy()).view(torch.float16)


_LOWERINGS: dict[str, tuple[Callable[[Bytes], Planes], int]] = {
    "Q8_0": (_q8_0, 34),
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q4_K": (_q4_k, 144),
    "Q6_K": (_q6_k, 210),
}
