"""The paged KV cache of one rank: its own KV heads of every layer, in blocks of `block_size`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from shards.errors import NotEnoughMemory
from shards.layout import Layout
from shards.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [blocks, kv_heads, block_size, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(
        self, k_TKH: torch.Tensor, v_TKH: torch.Tensor, blocks_T: torch.Tensor, at_T: torch.Tensor
    ) -> None:
        """Store each token's keys and values at its block and offset.

        Values are made finite: a masked position weighs 0, and 0 x NaN would reach whoever takes
        over the block of a sequence that went wrong.
        """
        self.keys[blocks_T, :, at_T] = k_TKH
        self.values[blocks_T, :, at_T] = v_TKH.nan_to_num()

    def copy(self, sources_N: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Copy whole blocks. All are read before any is written; targets are distinct."""
        self.keys[targets_N] = self.keys[sources_N]
        self.values[targets_N] = self.values[sources_N]


def allocate(
    spec: ModelSpec,
    layout: Layout,
    rank: int,
    *,
    blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[LayerCache, ...]:
    """Pools of `blocks` blocks for every layer; raises `NotEnoughMemory` if the device refuses."""
    caches = []
    try:
        for layer, split in zip(spec.layers, layout.layers, strict=True):
            shape = (blocks, len(split.kv_heads[rank]), block_size, layer.attention.head_dim)
            keys, values = (_zeros(shape, dtype, device) for _ in range(2))
            caches.append(LayerCache(keys, values))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise NotEnoughMemory(
            f"rank {rank} cannot hold a KV cache of {blocks} blocks of {block_size} tokens "
            f"({error}); give a smaller --kv-memory"
        ) from error
    return tuple(caches)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host, memory that the kernel hands out page by page as blocks are first written:
    `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    elements = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(elements).view(dtype).view(shape)
