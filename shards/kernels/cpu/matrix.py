"""Packed weights of any kind behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from shards.kernels.base import Weight
from shards.kernels.cpu import linear_float, linear_quantized, linear_widened
from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.linear_float import PackedFloat
from shards.kernels.cpu.linear_quantized import PackedQuantized
from shards.quantization.scheme import Scheme
from shards.quantization.tensor import QuantizedTensor

Allocate = Callable[[int], torch.Tensor]
Scratch = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class CpuMatrix:
    """Weights [outputs, inputs]: parts side by side along the outputs.

    More than one where a checkpoint quantises some of the matrices that a layer fuses, and where
    they are those of several experts, one after another.
    """

    parts: tuple[PackedFloat | PackedQuantized, ...]
    experts: int = 1

    @property
    def outputs(self) -> int:
        return sum(part.outputs for part in self.parts)

    @property
    def inputs(self) -> int:
        return self.parts[0].inputs

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def expert(self, e: int) -> CpuMatrix:
        """One of several experts."""
        each = len(self.parts) // self.experts
        return CpuMatrix(self.parts[e * each : (e + 1) * each])


def pack(weights: Sequence[Weight], allocate: Allocate) -> CpuMatrix:
    """Neighbours of a kind become one part."""
    parts: list[PackedFloat | PackedQuantized] = []
    for kind, alike in groupby(weights, _kind):
        if isinstance(kind, Scheme):
            quantised = [weight for weight in alike if isinstance(weight, QuantizedTensor)]
            parts.append(linear_quantized.pack_quantized(quantised, allocate))
        else:
            floats = [weight for weight in alike if isinstance(weight, torch.Tensor)]
            joined = floats[0] if len(floats) == 1 else torch.cat(floats)
            parts.append(linear_float.pack_float(joined, allocate))
    return CpuMatrix(tuple(parts))


def pack_experts(experts: Sequence[Sequence[Weight]], allocate: Allocate) -> CpuMatrix:
    """Each expert by itself, all in as many parts: as many as they have matrices, where a
    checkpoint quantises the matrices of some experts alike and those of others not."""
    counts = {sum(1 for _ in groupby(own, _kind)) for own in experts}
    each = experts if len(counts) == 1 else [[weight] for own in experts for weight in own]
    packed = [pack(own, allocate).parts for own in each]
    return CpuMatrix(tuple(part for parts in packed for part in parts), len(experts))


def _kind(weight: Weight) -> torch.dtype | Scheme:
    return weight.scheme if isinstance(weight, QuantizedTensor) else weight.dtype


def linear(
    matrix: CpuMatrix,
    x: torch.Tensor,
    y: torch.Tensor,
    scratch: Scratch,
    *,
    integers: bool,
    bias: torch.Tensor | None = None,
    rows: Header = Header.ROWS,
    add: bool = False,
) -> list[Instruction]:
    """y = x W^T (+ bias) (+ y). `scratch(nbytes)` lends room for the length of an instruction.

    Where weights are quantised, `integers` quantises x too, for integer dot products; otherwise
    the weights are widened as they are read.
    """
    found: list[Instruction] = []
    start = 0
    for part in matrix.parts:
        stop = start + part.outputs
        of_part = None if bias is None else bias[start:stop]
        target = y[:, start:stop]
        if isinstance(part, PackedFloat):
            found += linear_float.linear(part, x, target, bias_O=of_part, rows=rows, add=add)
        elif not integers:
            found += linear_widened.linear(part, x, target, bias=of_part, rows=rows, add=add)
        else:
            room = scratch(linear_quantized.scratch_bytes(len(x), part.inputs))
            found += linear_quantized.linear(
                part, x, target, room, bias=of_part, rows=rows, add=add
            )
        start = stop
    return found


def embed(
    matrix: CpuMatrix, tokens: torch.Tensor, x: torch.Tensor, first: int
) -> tuple[Instruction, ...]:
    """x[r] = row tokens[r] - first, or zeros where the matrix has no such row."""
    (part,) = matrix.parts
    if isinstance(part, PackedFloat):
        return linear_float.embed(part, tokens, x, first=first)
    return linear_quantized.embed(part, tokens, x, first)
