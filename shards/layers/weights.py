"""A rank's loaded parameters on their way into a kernel set."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Generic

import torch

from shards.errors import CheckpointError
from shards.kernels.base import KernelSet, Linear, M, Norm, Weight
from shards.models import spec


class Weights(Generic[M]):
    """Hands every parameter over once, and frees what was loaded as soon as it is packed."""

    def __init__(self, loaded: MutableMapping[str, Weight], kernels: KernelSet[M]) -> None:
        self._loaded = loaded
        self.kernels = kernels

    def matrix(self, *names: str) -> M:
        """The weights of these parameters, side by side along their outputs."""
        return self.kernels.pack([self._take(f"{name}.weight") for name in names])

    def experts(self, names: Sequence[Sequence[str]]) -> M:
        """For each expert, what `matrix` gives of its names; packed together."""
        taken = [[self._take(f"{name}.weight") for name in own] for own in names]
        return self.kernels.pack_experts(taken)

    def linear(self, *names: str, bias: bool = False) -> Linear[M]:
        """Those of linear layers that share their input, and their biases."""
        matrix = self.matrix(*names)
        if not bias:
            return Linear(matrix)
        return Linear(matrix, self.vector(*(f"{name}.bias" for name in names)))

    def norm(self, name: str, norm: spec.Norm) -> Norm:
        bias = self.vector(f"{name}.bias") if norm.bias else None
        return Norm(norm.kind, norm.eps, self.vector(f"{name}.weight"), bias)

    def vector(self, *names: str) -> torch.Tensor:
        """Parameters that are added or multiplied, joined."""
        return self.kernels.vector(torch.cat([self._floats(name) for name in names]))

    def stacked(self, names: Sequence[Sequence[str]]) -> torch.Tensor | None:
        """For each expert, what `vector` gives of its names, [experts, ..]; None where this rank
        has nothing of them."""
        if not any(name in self._loaded for own in names for name in own):
            return None
        joined = [torch.cat([self._floats(name) for name in own]) for own in names]
        return self.kernels.vector(torch.stack(joined))

    def constant(self, values: Sequence[float]) -> torch.Tensor:
        """Numbers that no checkpoint has, as `vector` gives those of one."""
        return self.kernels.vector(torch.tensor(values, dtype=torch.float64))

    def counters(self, count: int) -> torch.Tensor:
        """int64 zeros where the set keeps its operands."""
        return torch.zeros(count, dtype=torch.int64, device=self.constant([]).device)

    def close(self) -> None:
        """Raises `CheckpointError` if a parameter is left that nothing asked for."""
        if self._loaded:
            raise CheckpointError(f"no layer takes {', '.join(sorted(self._loaded))}")

    def _take(self, name: str) -> Weight:
        try:
            return self._loaded.pop(name)
        except KeyError:
            raise CheckpointError(f"parameter {name} was not loaded") from None

    def _floats(self, name: str) -> torch.Tensor:
        value = self._take(name)
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"parameter {name} is quantised, and must not be")
        return value
