"""One decoder for every family: the parts of a `ModelSpec`, cut for one rank.

Hidden states are replicated; each layer all-reduces once after its attention and once after its
FFN. Module names are the parameter names of `shards/models/parameters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from shards.batch import Batch
from shards.collectives.base import Collective
from shards.kernels.base import AttentionKernel
from shards.kv_cache import LayerCache
from shards.layers.attention import Attention
from shards.layers.embedding import Embedding
from shards.layers.ffn import FeedForward
from shards.layers.linear import ColumnLinear
from shards.layers.norm import Norm
from shards.layers.position import Angles, PositionTable, angles
from shards.layout import LayerSplit, Layout
from shards.models.spec import Layer, ModelSpec
from shards.timing import PhaseTimer


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(
        self, spec: ModelSpec, layer: Layer, split: LayerSplit, rank: int, kernel: AttentionKernel
    ) -> None:
        super().__init__()
        self.attention_norm = Norm(spec.width, spec.norm)
        self.attention = Attention(
            spec.width, layer.attention, split.heads[rank], split.kv_heads[rank], kernel
        )
        self.ffn_norm = Norm(spec.width, spec.norm)
        self.ffn = FeedForward(spec.width, layer.ffn, len(split.channels[rank]))

    def forward(
        self,
        x_TD: torch.Tensor,
        batch: Batch,
        cache: LayerCache,
        turn: Angles | None,
        collective: Collective,
        timer: PhaseTimer,
    ) -> torch.Tensor:
        partial_TD = self.attention(self.attention_norm(x_TD), batch, cache, turn)
        timer.mark("attention")
        x_TD = x_TD + self.attention.out.finish(collective.all_reduce(partial_TD))
        timer.mark("all_reduce")
        partial_TD = self.ffn(self.ffn_norm(x_TD))
        timer.mark("ffn")
        x_TD = x_TD + self.ffn.down.finish(collective.all_reduce(partial_TD))
        timer.mark("all_reduce")
        return x_TD


class Decoder(nn.Module):
    """A rank's share of the model."""

    def __init__(self, spec: ModelSpec, layout: Layout, rank: int, kernel: AttentionKernel) -> None:
        super().__init__()
        rows = layout.vocabulary[rank]
        self.rotary = spec.rotary
        self.embedding = Embedding(rows, spec.vocabulary, spec.width)
        self.positions = (
            None if spec.positions is None else PositionTable(spec.width, spec.positions)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, split, rank, kernel)
            for layer, split in zip(spec.layers, layout.layers, strict=True)
        )
        self.norm = Norm(spec.width, spec.norm)
        self.output = (
            None if spec.tied_embeddings else ColumnLinear(spec.width, len(rows), bias=False)
        )

    def forward(
        self,
        batch: Batch,
        caches: Sequence[LayerCache],
        collective: Collective,
        timer: PhaseTimer,
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: [T, D]."""
        x_TD = self.embedding(batch.tokens_T)
        timer.mark("embed")
        x_TD = collective.all_reduce(x_TD)
        timer.mark("all_reduce")
        if self.positions is not None:
            x_TD = x_TD + self.positions(batch.positions_T)
        turn = None
        if self.rotary is not None:
            turn = angles(self.rotary, batch.positions_T, x_TD.dtype)
        timer.mark("embed")
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TD = layer(x_TD, batch, cache, turn, collective, timer)
        return x_TD

    def logits(self, x_SD: torch.Tensor) -> torch.Tensor:
        """Of this rank's vocabulary rows, float32 [S, rows]."""
        rows = self.embedding if self.output is None else self.output
        return F.linear(self.norm(x_SD), rows.weight).float()
