"""A rank's loaded parameters on their way into a kernel set."""

from __future__ import annotations

from collections.abc import MutableMapping
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

    def linear(self, *names: str, bias: bool) -> Linear[M]:
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
