"""What the layers ask of a kernel set."""

from __future__ import annotations

from typing import Protocol

import torch

from shards.batch import DecodeRows, PrefillRows
from shards.kv_cache import LayerCache


class AttentionKernel(Protocol):
    """Causal attention of a rank's query heads over its paged KV cache.

    `kv_of_head[h]` is the local KV head that local query head h reads; it never falls, but a
    group may be cut short at either end. Queries are [.., heads, head_dim], in the cache's dtype;
    the answer has the same shape. Softmax is in float32.
    """

    def prefill(
        self,
        q_TNH: torch.Tensor,
        cache: LayerCache,
        rows: PrefillRows,
        kv_of_head: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        """Consecutive positions of one sequence, each seeing the cache up to itself."""
        ...

    def decode(
        self,
        q_SNH: torch.Tensor,
        cache: LayerCache,
        rows: DecodeRows,
        kv_of_head: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        """One newest position of each of S sequences."""
        ...
