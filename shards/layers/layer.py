"""A decoder layer: its two halves, and where its norms and sums stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

import torch

from shards.kernels.base import M, Norm, Rotation, Sentences
from shards.kv_cache import LayerCache
from shards.layers.attention import Attention
from shards.layers.experts import MixtureOfExperts
from shards.layers.ffn import FeedForward
from shards.layers.latent_attention import LatentAttention
from shards.layers.weights import Weights
from shards.layout import LayerSplit
from shards.models import spec


class Layer(Generic[M]):
    """x += attention(norm(x)); x += ffn(norm(x)), or both at once: see `shards.models.spec.Layer`.

    `rotations` has what every rotary embedding of the model is to kernels.
    """

    def __init__(
        self,
        layer: spec.Layer,
        norm: spec.Norm,
        rotations: Mapping[spec.Rotary, Rotation],
        split: LayerSplit,
        rank: int,
        weights: Weights[M],
        name: str,
    ) -> None:
        def norm_if(there: bool, of: str) -> Norm | None:
            return weights.norm(f"{name}.{of}", norm) if there else None

        self.parallel = layer.parallel
        self.scale = layer.residual_scale
        before = norm_if(layer.pre_norm, "attention_norm")
        self.attention = _attention(
            layer.attention, before, rotations, split, rank, weights, f"{name}.attention"
        )
        self.attention_post = norm_if(layer.post_norm, "attention_post_norm")
        self.attention_stream = norm_if(layer.stream_norm, "attention_stream_norm")
        if not layer.shared_norm:
            before = norm_if(layer.pre_norm, "ffn_norm")
        self.ffn: FeedForward[M] | MixtureOfExperts[M]
        if isinstance(layer.ffn, spec.MixtureOfExperts):
            self.ffn = MixtureOfExperts(layer.ffn, before, split.experts[rank], weights, name)
        else:
            self.ffn = FeedForward(layer.ffn, before, weights, f"{name}.ffn")
        self.ffn_post = norm_if(layer.post_norm, "ffn_post_norm")
        self.ffn_stream = norm_if(layer.stream_norm, "ffn_stream_norm")

    def __call__(self, step: Sentences[M], x_TD: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        attended = self.attention.part(step, x_TD, cache)
        if self.parallel:
            return step.merge(
                x_TD, (attended, *self.ffn.parts(step, x_TD)), "ffn", scale=self.scale
            )
        x_TD = step.merge(
            x_TD,
            (attended,),
            "attention",
            post_norm=self.attention_post,
            scale=self.scale,
            stream_norm=self.attention_stream,
        )
        return step.merge(
            x_TD,
            self.ffn.parts(step, x_TD),
            "ffn",
            post_norm=self.ffn_post,
            scale=self.scale,
            stream_norm=self.ffn_stream,
        )


def _attention(
    attention: spec.Attention | spec.LatentAttention,
    norm: Norm | None,
    rotations: Mapping[spec.Rotary, Rotation],
    split: LayerSplit,
    rank: int,
    weights: Weights[M],
    name: str,
) -> Attention[M] | LatentAttention[M]:
    if isinstance(attention, spec.LatentAttention):
        rotation = rotations[attention.rotary]
        return LatentAttention(attention, norm, rotation, split.heads[rank], weights, name)
    turned = None if attention.rotary is None else rotations[attention.rotary]
    return Attention(attention, norm, turned, split, rank, weights, name)
