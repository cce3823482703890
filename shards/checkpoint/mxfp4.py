"""MXFP4 as safetensors files hold it: 4-bit floats in blocks of 32 that share an exponent.

OCP Microscaling Formats (MX) Specification 1.0: an element is a sign, two bits of exponent and one
of mantissa (E2M1); a block's scale is a power of two (E8M0, biased by 127).
"""

from __future__ import annotations

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_BIAS = 127


def widen(codes_RN: torch.Tensor, exponents_RG: torch.Tensor) -> torch.Tensor:
    """float32 [rows, inputs] of uint8 [rows, inputs / 2], the earlier element in the low bits, and
    uint8 [rows, inputs / 32]."""
    nibbles_RN2 = torch.stack((codes_RN & 0x0F, codes_RN >> 4), -1)
    values_RI = _VALUES[nibbles_RN2.long()].flatten(1)
    groups_RGC = torch.unflatten(values_RI, 1, (exponents_RG.shape[1], -1))
    return torch.ldexp(groups_RGC, exponents_RG[:, :, None].int() - _BIAS).flatten(1)
