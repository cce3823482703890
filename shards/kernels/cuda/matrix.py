"""Weights as the CUDA kernels hold them.

    floats          one matmul (cuBLAS)
    codes           a byte each, widened on the way into the matmul
    4 bits in bf16  PyTorch's 4-bit matmul (`int4.py`)
    fp8             PyTorch's row-scaled matmul of 8-bit floats (`float8.py`)

Shape letters: T rows, R outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F

from shards.quantization.packing import unpack
from shards.quantization.tensor import QuantizedTensor


class CudaMatrix(Protocol):
    """`Matrix`, and the two things that a step does with it."""

    @property
    def outputs(self) -> int: ...

    @property
    def inputs(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W^T, [T, R], in the dtype of x."""
        ...

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        """The weights' rows `at`, [T, I]."""
        ...


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    weight_RI: torch.Tensor

    @property
    def outputs(self) -> int:
        return self.weight_RI.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight_RI.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight_RI.nbytes

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self.weight_RI)

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(at_T, self.weight_RI)


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """(code * scale) + minimum, exactly what the `QuantizedTensor` means, a byte to a code.

    codes_RI: int8, the zero of their scheme subtracted. scales_RG, minima_RG: float16.
    """

    codes_RI: torch.Tensor
    scales_RG: torch.Tensor
    minima_RG: torch.Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: QuantizedTensor, dtype: torch.dtype) -> GroupedMatrix:
        codes_RI = unpack(weight.codes, weight.scheme.bits).view(torch.int8) - weight.scheme.zero
        return cls(codes_RI, weight.scales, weight.minima, dtype)

    @property
    def outputs(self) -> int:
        return self.codes_RI.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes_RI.shape[1]

    @property
    def nbytes(self) -> int:
        minima = 0 if self.minima_RG is None else self.minima_RG.nbytes
        return self.codes_RI.nbytes + self.scales_RG.nbytes + minima

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        planes = (self.codes_RI, self.scales_RG, self.minima_RG)
        if len(x_TI) == 1:
            return _fused(_one_row, x_TI.device)(x_TI, *planes)
        return F.linear(x_TI, _fused(_widened, x_TI.device)(*planes, self.dtype))

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        minima = None if self.minima_RG is None else self.minima_RG[at_T]
        return _widened(self.codes_RI[at_T], self.scales_RG[at_T], minima, self.dtype)


def _widened(
    codes_RI: torch.Tensor,
    scales_RG: torch.Tensor,
    minima_RG: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computed in float32, rounded once."""
    groups = codes_RI.view(*scales_RG.shape, -1).float()
    groups = groups * scales_RG.float().unsqueeze(2)
    if minima_RG is not None:
        groups = groups + minima_RG.float().unsqueeze(2)
    return groups.flatten(1).to(dtype)


def _one_row(
    x_1I: torch.Tensor,
    codes_RI: torch.Tensor,
    scales_RG: torch.Tensor,
    minima_RG: torch.Tensor | None,
) -> torch.Tensor:
    """A product and a sum, which the compiler makes one kernel that reads each code once."""
    weight_RI = _widened(codes_RI, scales_RG, minima_RG, torch.float32)
    return (weight_RI * x_1I.float()).sum(1)[None].to(x_1I.dtype)


_Function = Callable[..., torch.Tensor]


def _fused(function: _Function, device: torch.device) -> _Function:
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: _Function) -> _Function:
    """One kernel for all sizes. The CPU, where only tests come, would need a C++ compiler."""
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Matrices of different forms with the same inputs, joined along their outputs."""

    parts: tuple[CudaMatrix, ...]

    @property
    def outputs(self) -> int:
        return sum(part.outputs for part in self.parts)

    @property
    def inputs(self) -> int:
        return self.parts[0].inputs

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.apply(x_TI) for part in self.parts], -1)

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        raise TypeError("rows are looked up in one matrix, not in several joined")
