"""One decoder for every family: the parts of a `ModelSpec`, cut for one rank.

Hidden states are replicated; each layer all-reduces once after its attention and once after its
FFN, or once for both where they are parallel. Parameter names are those of
`shards/models/parameters.py`. What a step computes is said to a kernel set in sentences
(`shards/kernels/base.py`).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Generic

import torch

from shards.kernels.base import (
    Embedding,
    Head,
    KernelSet,
    Linear,
    M,
    Pattern,
    PositionTable,
    Sentences,
    Weight,
)
from shards.kv_cache import LayerCache
from shards.layers.experts import MixtureOfExperts
from shards.layers.layer import Layer
from shards.layers.position import rotation_of
from shards.layers.weights import Weights
from shards.layout import Layout
from shards.models.spec import ModelSpec


class Decoder(Generic[M]):
    """A rank's share of the model, its weights packed for a kernel set.

    `loaded` is emptied: parameter names to this rank's slices (`checkpoint.loader.load_shard`).
    `context` is the longest sequence that is served; the model's own by default.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        rank: int,
        loaded: MutableMapping[str, Weight],
        kernels: KernelSet[M],
        context: int | None = None,
    ) -> None:
        weights = Weights(loaded, kernels)
        self.embedding = Embedding(
            weights.matrix("embedding"),
            layout.vocabulary[rank].start,
            spec.embedding_scale,
            weights.norm("embedding_norm", spec.norm) if spec.embedding_norm else None,
            weights.matrix("embedding_projection") if spec.embedding_width is not None else None,
        )
        self.positions = None
        if spec.positions is not None:
            table = weights.vector("positions.weight")
            self.positions = PositionTable(table, spec.positions.offset)
        # Equal ones share one object, so that a step computes their angles once.
        rotaries = {layer.attention.rotary for layer in spec.layers}
        rotations = {r: rotation_of(r, context or spec.context) for r in rotaries if r is not None}
        self.layers = [
            Layer(layer, spec.norm, rotations, split, rank, weights, f"layers.{i}")
            for i, (layer, split) in enumerate(zip(spec.layers, layout.layers, strict=True))
        ]
        matrix = self.embedding.matrix if spec.tied_embeddings else weights.matrix("output")
        bias = weights.vector("output.bias") if spec.output_bias else None
        self.head = Head(
            weights.norm("norm", spec.norm) if spec.final_norm else None,
            Linear(matrix, bias),
            spec.logit_scale,
            spec.logit_softcap,
            weights.matrix("output_projection") if spec.embedding_width is not None else None,
        )
        weights.close()

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """How each layer attends."""
        return tuple(layer.attention.pattern for layer in self.layers)

    def hidden(self, step: Sentences[M], caches: Sequence[LayerCache]) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: [T, D]."""
        x_TD = step.embed(self.embedding, self.positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TD = layer(step, x_TD, cache)
        return x_TD

    def logits(self, step: Sentences[M], x_SD: torch.Tensor) -> torch.Tensor:
        """Of this rank's vocabulary rows, float32 [S, V]."""
        return step.logits(x_SD, self.head)

    def expert_loads(self) -> dict[int, tuple[int, ...]]:
        """Layer -> the tokens that each of its experts was sent so far, on this rank or another."""
        return {
            i: tuple(layer.ffn.experts.load.tolist())
            for i, layer in enumerate(self.layers)
            if isinstance(layer.ffn, MixtureOfExperts)
        }
