"""Attention of this rank's query heads over its own KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch

from shards.kernels.base import HeadNorms, Joint, M, Norm, Part, Pattern, Rotation, Sentences
from shards.kv_cache import LayerCache
from shards.layers.weights import Weights
from shards.layout import LayerSplit, Range
from shards.models import spec


class Attention(Generic[M]):
    """out(attend(qkv(norm(x)))). MHA, GQA and MQA alike: the pattern says which KV head a query
    head reads."""

    def __init__(
        self,
        attention: spec.Attention,
        norm: Norm | None,
        rotation: Rotation | None,
        split: LayerSplit,
        rank: int,
        weights: Weights[M],
        name: str,
    ) -> None:
        self.norm = norm
        self.rotation = rotation
        self.qkv = weights.linear(f"{name}.q", f"{name}.k", f"{name}.v", bias=attention.qkv_bias)
        self.head_norms = _head_norms(attention, split.kv_heads, rank, weights, name)
        heads, kv_heads = split.heads[rank], split.kv_heads[rank]
        self.pattern = Pattern(
            kv_of_head=tuple(
                head // attention.group - kv_heads.start for head in range(heads.start, heads.stop)
            ),
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
            sinks=weights.vector(f"{name}.sinks.weight") if attention.sinks else None,
            slopes=_slopes(attention, heads, weights),
            mask=attention.mask,
        )
        self.out = weights.linear(f"{name}.out", bias=attention.out_bias)

    def part(self, step: Sentences[M], x_TD: torch.Tensor, cache: LayerCache) -> Part[M]:
        """This rank's share of what is added to x."""
        q_TNH = step.project(
            x_TD, self.norm, self.qkv, self.pattern, self.head_norms, self.rotation, cache
        )
        return Part(step.attend(q_TNH, self.pattern, cache), self.out)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of all heads (arXiv:2108.12409): 2^(-8 (i + 1) / n) where n heads are a power of two; else
    those of the largest power of two below, and every other one of twice as many heads."""
    near = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / near) for i in range(near)]
    slopes += [2 ** (-4 * (2 * i + 1) / near) for i in range(heads - near)]
    return tuple(slopes)


def _slopes(attention: spec.Attention, heads: Range, weights: Weights[M]) -> torch.Tensor | None:
    if attention.alibi is None:
        return None
    slopes = alibi_slopes(attention.heads)[heads.start : heads.stop]
    return weights.constant([attention.alibi * slope for slope in slopes])


def _head_norms(
    attention: spec.Attention,
    kv_heads: Sequence[Range],
    rank: int,
    weights: Weights[M],
    name: str,
) -> HeadNorms | None:
    given = attention.qk_norm
    if given is None:
        return None
    joint = None
    if given.joint:
        counted = max((run.stop for run in kv_heads[:rank]), default=0)
        joint = Joint(
            q_channels=attention.heads * attention.head_dim,
            k_channels=attention.kv_heads * attention.head_dim,
            copies=max(0, counted - kv_heads[rank].start),
        )
    return HeadNorms(
        q=weights.norm(f"{name}.q_norm", given.norm),
        k=weights.norm(f"{name}.k_norm", given.norm),
        joint=joint,
    )
