"""One decoder for every family: the parts of a `ModelSpec`, cut for one rank.

Hidden states are replicated; each layer all-reduces once after its attention and once after its
FFN. Parameter names are those of `shards/models/parameters.py`. What a step computes is said to a
kernel set in sentences (`shards/kernels/base.py`).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Generic

import torch

from shards.kernels.base import Embedding, KernelSet, M, PositionTable, Sentences, Weight
from shards.kv_cache import LayerCache
from shards.layers.attention import Attention
from shards.layers.ffn import FeedForward
from shards.layers.position import rotation_of
from shards.layers.weights import Weights
from shards.layout import Layout
from shards.models.spec import ModelSpec


class Decoder(Generic[M]):
    """A rank's share of the model, its weights packed for a kernel set.

    `loaded` is emptied: parameter names to this rank's slices (`checkpoint.loader.load_shard`).
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        rank: int,
        loaded: MutableMapping[str, Weight],
        kernels: KernelSet[M],
    ) -> None:
        weights = Weights(loaded, kernels)
        self.rotation = None if spec.rotary is None else rotation_of(spec.rotary)
        self.embedding = Embedding(weights.matrix("embedding"), layout.vocabulary[rank].start)
        self.positions = None
        if spec.positions is not None:
            table = weights.vector("positions.weight")
            self.positions = PositionTable(table, spec.positions.offset)
        self.layers = [
            (
                Attention(
                    layer.attention,
                    spec.norm,
                    split.heads[rank],
                    split.kv_heads[rank],
                    weights,
                    f"layers.{i}.attention",
                ),
                FeedForward(layer.ffn, spec.norm, weights, f"layers.{i}.ffn"),
            )
            for i, (layer, split) in enumerate(zip(spec.layers, layout.layers, strict=True))
        ]
        self.norm = weights.norm("norm", spec.norm)
        self.output = self.embedding.matrix if spec.tied_embeddings else weights.matrix("output")
        weights.close()

    def hidden(self, step: Sentences[M], caches: Sequence[LayerCache]) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: [T, D]."""
        x_TD = step.embed(self.embedding, self.positions)
        for (attention, ffn), cache in zip(self.layers, caches, strict=True):
            x_TD = attention(step, x_TD, self.rotation, cache)
            x_TD = ffn(step, x_TD)
        return x_TD

    def logits(self, step: Sentences[M], x_SD: torch.Tensor) -> torch.Tensor:
        """Of this rank's vocabulary rows, float32 [S, V]."""
        return step.logits(x_SD, self.norm, self.output)
