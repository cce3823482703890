"""Feed-forward layers: this rank's channels."""

from __future__ import annotations

from typing import Generic

import torch

from shards.kernels.base import M, Sentences
from shards.layers.weights import Weights
from shards.models import spec


class FeedForward(Generic[M]):
    """x += down(act(up(norm(x)))), with a gate where the spec has one (arXiv:2002.05202)."""

    def __init__(
        self, ffn: spec.FeedForward, norm: spec.Norm, weights: Weights[M], name: str
    ) -> None:
        self.activation = ffn.activation
        self.gated = ffn.gated
        self.norm = weights.norm(f"{name}_norm", norm)
        parts = ("gate", "up") if ffn.gated else ("up",)
        self.up = weights.linear(*(f"{name}.{part}" for part in parts), bias=ffn.bias)
        self.down = weights.linear(f"{name}.down", bias=ffn.bias)

    def __call__(self, step: Sentences[M], x_TD: torch.Tensor) -> torch.Tensor:
        h_TF = step.expand(x_TD, self.norm, self.up, self.activation, self.gated)
        return step.merge(x_TD, h_TF, self.down, "ffn")
