"""Codes, several to a byte.

Codes are packed in blocks of 32 along the inputs; a row's blocks follow one another.

    8 bits  32 bytes: byte j is code j, signed (two's complement).
    4 bits  16 bytes: byte j holds code j in its low nibble and code j + 16 in its high one. This is
            the order of GGUF's Q4_0 and Q4_1.
    6 bits  24 bytes: 16 with the low four bits of each code, in the order of 4-bit codes; then 8
            with the high two: byte j holds those of codes j, j + 8, j + 16 and j + 24, from its
            lowest bits up.
"""

from __future__ import annotations

import torch

from shards.quantization.scheme import BLOCK


def pack(codes_RI: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, inputs], one code below 2^bits each -> uint8 [rows, inputs * bits / 8].

    `inputs` is a multiple of 32, `bits` 4, 6 or 8.
    """
    if bits == 8:
        return codes_RI
    blocks_RBC = torch.unflatten(codes_RI, 1, (-1, BLOCK))
    packed_RBN = _nibbles(blocks_RBC & 0x0F)
    if bits == 6:
        packed_RBN = torch.cat((packed_RBN, _pairs(blocks_RBC >> 4)), 2)
    return packed_RBN.flatten(1)


def unpack(packed_RN: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed_RN
    blocks_RBN = torch.unflatten(packed_RN, 1, (-1, BLOCK * bits // 8))
    low_RBH = blocks_RBN[..., : BLOCK // 2]
    codes_RBC = torch.cat((low_RBH & 0x0F, low_RBH >> 4), 2)
    if bits == 6:
        high_RBQ = blocks_RBN[..., BLOCK // 2 :]
        codes_RBC |= torch.cat([(high_RBQ >> shift & 3) << 4 for shift in (0, 2, 4, 6)], 2)
    return codes_RBC.flatten(1)


def _nibbles(codes_RBC: torch.Tensor) -> torch.Tensor:
    low, high = codes_RBC.chunk(2, 2)
    return low | high << 4


def _pairs(codes_RBC: torch.Tensor) -> torch.Tensor:
    first, second, third, fourth = codes_RBC.chunk(4, 2)
    return first | second << 2 | third << 4 | fourth << 6
