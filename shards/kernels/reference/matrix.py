"""Weights as they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shards.kernels.base import Weight


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """Weights [outputs, inputs] as they came; quantised ones are widened at every use.

    Several experts are one matrix too, the weights of each after those of the one before.
    """

    weights: tuple[Weight, ...]
    dtype: torch.dtype
    experts: int = 1

    @property
    def outputs(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def apply(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x W^T, [T, outputs]."""
        return torch.cat([F.linear(x_TD, weight) for weight in self._wide()], -1)

    def expert(self, e: int) -> PlainMatrix:
        """One of several experts."""
        each = len(self.weights) // self.experts
        return PlainMatrix(self.weights[e * each : (e + 1) * each], self.dtype)

    def rows(self, at: torch.Tensor) -> torch.Tensor:
        """The weights' rows `at`."""
        (weight,) = self._wide()
        return F.embedding(at, weight)

    def _wide(self) -> list[torch.Tensor]:
        return [
            weight if isinstance(weight, torch.Tensor) else weight.dequantize(self.dtype)
            for weight in self.weights
        ]

    @classmethod
    def of(cls, weights: Sequence[Weight], dtype: torch.dtype) -> PlainMatrix:
        """Floats become one weight."""
        if len(weights) > 1 and all(isinstance(weight, torch.Tensor) for weight in weights):
            weights = [torch.cat([w for w in weights if isinstance(w, torch.Tensor)])]
        return cls(tuple(weights), dtype)
