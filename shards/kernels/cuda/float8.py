"""Weights and activations in 8-bit floats (e4m3), each row with a scale of its own.

Shape letters: T rows, R outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
# The kernel loads 16 bytes at a time.
_ALIGNED = 16


def fits(weight_RI: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the row-scaled matmul takes such a matrix; its results are bfloat16."""
    outputs, inputs = weight_RI.shape
    return dtype == torch.bfloat16 and outputs % _ALIGNED == 0 and inputs % _ALIGNED == 0


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """weight_RI float8 and scales_R1 float32; activations are scaled row by row as they come."""

    weight_RI: torch.Tensor
    scales_R1: torch.Tensor

    @classmethod
    def of(cls, weight_RI: torch.Tensor) -> Float8Matrix:
        """Floats, rounded to the nearest of e4m3's: 3 bits after the leading one."""
        return cls(*_scaled(weight_RI))

    @property
    def outputs(self) -> int:
        return self.weight_RI.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight_RI.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight_RI.nbytes + self.scales_R1.nbytes

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        x_f8_TI, scales_T1 = _scaled(x_TI)
        return torch._scaled_mm(
            x_f8_TI,
            self.weight_RI.t(),
            scale_a=scales_T1,
            scale_b=self.scales_R1.t(),
            out_dtype=x_TI.dtype,
        )

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        return (self.weight_RI[at_T].float() * self.scales_R1[at_T]).bfloat16()


def _scaled(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8 times float32 [T, 1]; a row of zeros has a scale above 0."""
    tiny = torch.finfo(torch.float32).tiny
    scales_T1 = (x_TI.abs().amax(-1, keepdim=True).float() / _LARGEST).clamp(min=tiny)
    return (x_TI.float() / scales_T1).clamp(-_LARGEST, _LARGEST).to(_FLOAT8), scales_T1
