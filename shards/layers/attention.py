"""Attention of this rank's query heads over its own KV heads."""

from __future__ import annotations

import torch
from torch import nn

from shards.batch import Batch
from shards.kernels.base import AttentionKernel, Pattern
from shards.kv_cache import LayerCache
from shards.layers.linear import ColumnLinear, RowLinear
from shards.layers.position import Angles
from shards.layout import Range
from shards.models import spec


class Attention(nn.Module):
    """MHA, GQA and MQA alike: the pattern says which KV head a query head reads."""

    def __init__(
        self,
        width: int,
        attention: spec.Attention,
        heads: Range,
        kv_heads: Range,
        kernel: AttentionKernel,
    ) -> None:
        super().__init__()
        head_dim, bias = attention.head_dim, attention.qkv_bias
        self.head_dim = head_dim
        self.kernel = kernel
        self.pattern = Pattern(
            kv_of_head=tuple(
                head // attention.group - kv_heads.start for head in range(heads.start, heads.stop)
            ),
            scale=attention.scale,
            window=attention.window,
        )
        self.q = ColumnLinear(width, len(heads) * head_dim, bias)
        self.k = ColumnLinear(width, len(kv_heads) * head_dim, bias)
        self.v = ColumnLinear(width, len(kv_heads) * head_dim, bias)
        self.out = RowLinear(len(heads) * head_dim, width, attention.out_bias)

    def forward(
        self, x_TD: torch.Tensor, batch: Batch, cache: LayerCache, angles: Angles | None
    ) -> torch.Tensor:
        """This rank's summand of the output, [T, D]; keys and values go into the cache."""
        q, k, v = (
            part(x_TD).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v)
        )
        if angles is not None:
            q, k = angles.rotate(q), angles.rotate(k)
        cache.write(k, v, batch.blocks_T, batch.offsets_T)
        return self.out(self._attend(q, batch, cache).flatten(1))

    def _attend(self, q_TNH: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        decode, kernel, pattern = batch.decode, self.kernel, self.pattern
        if decode is not None and not batch.prefills:
            return kernel.decode(q_TNH, cache, decode, pattern)
        out_TNH = torch.empty_like(q_TNH)
        if decode is not None:
            out_TNH[decode.rows_S] = kernel.decode(q_TNH[decode.rows_S], cache, decode, pattern)
        for rows in batch.prefills:
            span = slice(rows.start, rows.stop)
            out_TNH[span] = kernel.prefill(q_TNH[span], cache, rows, pattern)
        return out_TNH
