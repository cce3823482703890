"""Attention of this rank's query heads over its own KV heads."""

from __future__ import annotations

from typing import Generic

import torch

from shards.kernels.base import M, Pattern, Rotation, Sentences
from shards.kv_cache import LayerCache
from shards.layers.weights import Weights
from shards.layout import Range
from shards.models import spec


class Attention(Generic[M]):
    """x += out(attend(qkv(norm(x)))). MHA, GQA and MQA alike: the pattern says which KV head a
    query head reads."""

    def __init__(
        self,
        attention: spec.Attention,
        norm: spec.Norm,
        heads: Range,
        kv_heads: Range,
        weights: Weights[M],
        name: str,
    ) -> None:
        self.pattern = Pattern(
            kv_of_head=tuple(
                head // attention.group - kv_heads.start for head in range(heads.start, heads.stop)
            ),
            scale=attention.scale,
            window=attention.window,
        )
        self.norm = weights.norm(f"{name}_norm", norm)
        self.qkv = weights.linear(f"{name}.q", f"{name}.k", f"{name}.v", bias=attention.qkv_bias)
        self.out = weights.linear(f"{name}.out", bias=attention.out_bias)

    def __call__(
        self,
        step: Sentences[M],
        x_TD: torch.Tensor,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        q_TNH = step.project(x_TD, self.norm, self.qkv, self.pattern, rotation, cache)
        y_TN = step.attend(q_TNH, self.pattern, cache)
        return step.merge(x_TD, y_TN, self.out, "attention")
