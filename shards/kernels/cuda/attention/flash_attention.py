"""Attention through FlashAttention 3 (arXiv:2407.08608): its module `flash_attn_interface`.

Release 2 (`flash_attn`) takes pages of 256 tokens and more, which our blocks never are.
"""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar

import numpy as np
import torch

from shards.batch import Batch
from shards.kernels.base import Pattern
from shards.kernels.cuda.attention.base import Geometry
from shards.kernels.cuda.attention.groups import groups_of
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.cuda.pages import starts_of
from shards.kv_cache import LayerCache

LIBRARY = "flash_attn_interface"
_HOPPER = (9, 0)
_MAX_HEAD_DIM = 256


class FlashAttention:
    """One kernel for prefill and decode, over block tables as they are."""

    name = "flash_attention"
    module: ClassVar[str | None] = LIBRARY

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    @staticmethod
    def unfit(geometry: Geometry) -> str | None:
        """Why it cannot serve these caches, if it cannot."""
        if geometry.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in 16 bits, not in {geometry.dtype}"
        if not geometry.plain:
            return "it is used for plain causal attention with a window alone"
        bad = [dim for dim in sorted(geometry.head_dims) if dim % 8 or dim > _MAX_HEAD_DIM]
        if bad:
            return f"head_dim {bad[0]} is no multiple of 8 up to {_MAX_HEAD_DIM}"
        if torch.cuda.get_device_capability(geometry.device) < _HOPPER:
            return "it needs a GPU of compute capability 9.0"
        return None

    def captures(self, rows: int) -> bool:
        return True

    def captured(self, rows: int) -> PagedAttention:
        return PagedAttention(self._geometry, fixed=True)

    def eager(self) -> PagedAttention:
        return PagedAttention(self._geometry, fixed=False)


class PagedAttention:
    """Steps of any kind; where `fixed`, of one number of rows and one width of tables."""

    def __init__(self, geometry: Geometry, *, fixed: bool) -> None:
        self._device = geometry.device
        self._mirror = Mirror(geometry.device, fixed=fixed)
        self._row_starts = self._contexts = self._tables = torch.empty(0)
        self._longest = 0

    def plan(self, batch: Batch) -> None:
        counts, contexts, tables = batch.spans_S4[:, 1], batch.spans_S4[:, 2], batch.spans_S4[:, 3]
        self._longest = int(counts.max())
        self._row_starts = self._mirror.put("row_starts", starts_of(counts))
        self._contexts = self._mirror.put("contexts", contexts.astype(np.int32))
        self._tables = self._mirror.put("tables", batch.tables[tables].astype(np.int32))

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        groups = groups_of(pattern, self._device)
        out = import_module(LIBRARY).flash_attn_with_kvcache(
            groups.spread(q_TNH),
            cache.keys.transpose(1, 2),  # [blocks, block_size, kv_heads, head_dim], as a view
            cache.values.transpose(1, 2),
            cache_seqlens=self._contexts,
            page_table=self._tables,
            cu_seqlens_q=self._row_starts,
            max_seqlen_q=self._longest,
            softmax_scale=pattern.scale,
            causal=True,
            window_size=(-1, -1) if pattern.window is None else (pattern.window - 1, 0),
        )
        return groups.collect(out)
