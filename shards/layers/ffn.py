"""Feed-forward layers: this rank's channels."""

from __future__ import annotations

from typing import Generic

import torch

from shards.kernels.base import Gating, M, Norm, Part, Sentences
from shards.layers.weights import Weights
from shards.models import spec


class FeedForward(Generic[M]):
    """down(act(up(norm(x)))), with a gate where the spec has one (arXiv:2002.05202). `token_gate`
    names a linear layer to one number, whose sigmoid weighs each token's answer."""

    def __init__(
        self,
        ffn: spec.FeedForward,
        norm: Norm | None,
        weights: Weights[M],
        name: str,
        token_gate: str | None = None,
    ) -> None:
        self.norm = norm
        self.gating = gating_of(ffn)
        self.token_gate = None if token_gate is None else weights.matrix(token_gate)
        parts = ("gate", "up") if ffn.gated else ("up",)
        self.up = weights.linear(*(f"{name}.{part}" for part in parts), bias=ffn.bias)
        self.down = weights.linear(f"{name}.down", bias=ffn.bias)

    def parts(self, step: Sentences[M], x_TD: torch.Tensor) -> tuple[Part[M], ...]:
        """This rank's share of what is added to x."""
        h_TF = step.expand(x_TD, self.norm, self.up, self.gating, self.token_gate)
        return (Part(h_TF, self.down),)


def gating_of(ffn: spec.FeedForward) -> Gating:
    return Gating(ffn.activation, ffn.gated, ffn.clamp)
