"""Multi-head latent attention: this rank's query heads over the latents, which every rank holds."""

from __future__ import annotations

from typing import Generic

import torch

from shards.kernels.base import Latent, Linear, M, Norm, Part, Pattern, Rotation, Sentences
from shards.kv_cache import LayerCache
from shards.layers.weights import Weights
from shards.layout import Range
from shards.models import spec


class LatentAttention(Generic[M]):
    """out(attend(norm(x))) over the cached latents, in the absorbed form (arXiv:2405.04434)."""

    def __init__(
        self,
        attention: spec.LatentAttention,
        norm: Norm | None,
        rotation: Rotation,
        heads: Range,
        weights: Weights[M],
        name: str,
    ) -> None:
        self.norm = norm
        self.rotation = rotation
        self.pattern = Pattern(kv_of_head=(0,) * len(heads), scale=attention.scale)
        through = attention.query_rank is not None
        self.latent = Latent(
            down=_down(attention, heads, weights, name),
            query_norm=weights.norm(f"{name}.q_norm", attention.norm) if through else None,
            query=weights.linear(f"{name}.q") if through else None,
            norm=weights.norm(f"{name}.kv_norm", attention.norm),
            key_up=_by_head(weights.vector(f"{name}.k_up.weight"), attention.nope_dim),
            value_up=_by_head(weights.vector(f"{name}.v_up.weight"), attention.value_dim),
        )
        self.out = weights.linear(f"{name}.out", bias=attention.bias)

    def part(self, step: Sentences[M], x_TD: torch.Tensor, cache: LayerCache) -> Part[M]:
        """This rank's share of what is added to x."""
        y_TN = step.attend_latent(x_TD, self.norm, self.latent, self.pattern, self.rotation, cache)
        return Part(y_TN, self.out)


def _down(
    attention: spec.LatentAttention, heads: Range, weights: Weights[M], name: str
) -> Linear[M]:
    """What makes queries, or their latent, and the latent of keys and values. Queries that come
    from x itself have no bias."""
    if attention.query_rank is not None:
        return weights.linear(f"{name}.q_down", f"{name}.kv_down", bias=attention.bias)
    matrix = weights.matrix(f"{name}.q", f"{name}.kv_down")
    if not attention.bias:
        return Linear(matrix)
    of_latent = weights.vector(f"{name}.kv_down.bias")
    of_queries = of_latent.new_zeros(len(heads) * (attention.nope_dim + attention.rope_dim))
    return Linear(matrix, torch.cat((of_queries, of_latent)))


def _by_head(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """[N * dim, L] -> [N, dim, L]."""
    return torch.unflatten(rows, 0, (-1, dim))
