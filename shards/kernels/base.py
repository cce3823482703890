"""What the layers ask of a kernel set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from shards.batch import DecodeRows, PrefillRows
from shards.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a rank's query heads attend.

    `kv_of_head[h]` is the local KV head that local query head h reads; it never falls, but a group
    may be cut short at either end. `scale` multiplies q k. With a `window`, a position sees that
    many positions, itself the last of them.
    """

    kv_of_head: tuple[int, ...]
    scale: float
    window: int | None = None


class AttentionKernel(Protocol):
    """Causal attention of a rank's query heads over its paged KV cache.

    Queries are [.., heads, head_dim], in the cache's dtype; the answer has the same shape. Softmax
    is in float32. Blocks that lie wholly before a window may hold anything.
    """

    def prefill(
        self, q_TNH: torch.Tensor, cache: LayerCache, rows: PrefillRows, pattern: Pattern
    ) -> torch.Tensor:
        """Consecutive positions of one sequence, each seeing the cache up to itself."""
        ...

    def decode(
        self, q_SNH: torch.Tensor, cache: LayerCache, rows: DecodeRows, pattern: Pattern
    ) -> torch.Tensor:
        """One newest position of each of S sequences."""
        ...
