"""A weight as codes, scales and minima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from shards.quantization.packing import unpack
from shards.quantization.scheme import BLOCK, Scheme


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight [rows, inputs] in `scheme`, which says what its codes mean.

    codes: uint8 [rows, inputs * bits / 8], in the order of `shards/quantization/packing.py`.
    scales: float16 [rows, inputs / group].
    minima: as the scales; None in a symmetric scheme.
    `rows`, `columns` and `permuted` share the planes' memory where torch does.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, scheme: Scheme, rows: int, inputs: int, device: torch.device | None = None
    ) -> QuantizedTensor:
        """To be filled; raises `ValueError` where `inputs` are not whole blocks of 32."""
        _check_whole_blocks(0, inputs)
        scales = torch.empty(rows, inputs // scheme.group, dtype=torch.float16, device=device)
        codes = torch.empty(rows, scheme.code_bytes(inputs), dtype=torch.uint8, device=device)
        return cls(scheme, codes, scales, torch.empty_like(scales) if scheme.has_minimum else None)

    @property
    def shape(self) -> torch.Size:
        """[rows, inputs] of the weight that this stands for."""
        rows, groups = self.scales.shape
        return torch.Size((rows, groups * self.scheme.group))

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        """Codes, scales and, where there are any, minima."""
        planes = (self.codes, self.scales, self.minima)
        return tuple(plane for plane in planes if plane is not None)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, inputs], computed in float32 and rounded once to `dtype`."""
        codes_RI = unpack(self.codes, self.scheme.bits)
        if self.scheme.bits == 8:
            codes_RI = codes_RI.view(torch.int8)
        groups_RGC = torch.unflatten(codes_RI, 1, (-1, self.scheme.group)).float()
        groups_RGC.sub_(self.scheme.zero).mul_(self.scales.float().unsqueeze(2))
        if self.minima is not None:
            groups_RGC.add_(self.minima.float().unsqueeze(2))
        return groups_RGC.flatten(1).to(dtype)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        return self.permuted(lambda plane: plane[start:stop])

    def columns(self, start: int, stop: int) -> QuantizedTensor:
        """The inputs `start` to `stop`; raises `ValueError` unless both are multiples of 32."""
        _check_whole_blocks(start, stop)
        group = slice(start // self.scheme.group, stop // self.scheme.group)
        code = slice(self.scheme.code_bytes(start), self.scheme.code_bytes(stop))
        return replace(
            self,
            codes=self.codes[:, code],
            scales=self.scales[:, group],
            minima=None if self.minima is None else self.minima[:, group],
        )

    def permuted(self, order: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """`order` picks or reorders the rows of a matrix; applied to every plane."""
        return replace(
            self,
            codes=order(self.codes),
            scales=order(self.scales),
            minima=None if self.minima is None else order(self.minima),
        )

    def copy_(self, other: QuantizedTensor) -> QuantizedTensor:
        """Overwrite this with `other`, of the same scheme and shape."""
        for plane, source in zip(self.planes, other.planes, strict=True):
            plane.copy_(source)
        return self


def _check_whole_blocks(start: int, stop: int) -> None:
    if start % BLOCK or stop % BLOCK:
        raise ValueError(
            f"inputs {start} to {stop} of a quantised weight: its codes can be cut at multiples "
            f"of {BLOCK} only"
        )
