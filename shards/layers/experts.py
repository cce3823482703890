"""A mixture of experts: this rank's experts, or its channels of every expert."""

from __future__ import annotations

from typing import Generic

import torch

from shards.kernels.base import Experts, M, Norm, Part, Sentences
from shards.layers.ffn import FeedForward, gating_of
from shards.layers.weights import Weights
from shards.layout import Range
from shards.models import spec


class MixtureOfExperts(Generic[M]):
    """The weighed sum of each token's experts, and the shared one's answer, both of norm(x)."""

    def __init__(
        self,
        mixture: spec.MixtureOfExperts,
        norm: Norm | None,
        held: Range,
        weights: Weights[M],
        name: str,
    ) -> None:
        self.norm = norm
        router, expert = mixture.router, mixture.expert
        names = [f"{name}.experts.{e}" for e in range(held.start, held.stop)]
        parts = ("gate", "up") if expert.gated else ("up",)
        self.experts = Experts(
            router=weights.matrix(f"{name}.router"),
            router_bias=weights.vector(f"{name}.router.bias") if router.bias else None,
            correction=weights.vector(f"{name}.router.correction") if router.correction else None,
            choice=router,
            first=held.start,
            count=len(held),
            up=weights.experts([[f"{at}.{part}" for part in parts] for at in names]),
            up_bias=weights.stacked([[f"{at}.{part}.bias" for part in parts] for at in names])
            if expert.bias
            else None,
            down=weights.experts([[f"{at}.down"] for at in names]),
            down_bias=weights.stacked([[f"{at}.down.bias"] for at in names])
            if expert.bias
            else None,
            gating=gating_of(expert),
            load=weights.counters(mixture.experts),
        )
        gate = f"{name}.shared_gate" if mixture.shared_gate else None
        self.shared = (
            None
            if mixture.shared is None
            else FeedForward(mixture.shared, norm, weights, f"{name}.shared", gate)
        )

    def parts(self, step: Sentences[M], x_TD: torch.Tensor) -> tuple[Part[M], ...]:
        """This rank's share of what is added to x."""
        mixed: Part[M] = Part(step.mix(x_TD, self.norm, self.experts))
        return (mixed,) if self.shared is None else (mixed, *self.shared.parts(step, x_TD))
