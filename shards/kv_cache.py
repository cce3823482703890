"""The paged KV cache of one rank: its own KV heads of every layer, in blocks of `block_size`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each [blocks, kv_heads, block_size, head_dim].

    Latent attention's values are the first channels of its keys: a view, no memory of their own.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of_latents(cls, keys: torch.Tensor, value_dim: int) -> LayerCache:
        return cls(keys, keys[..., :value_dim])

    @property
    def is_latent(self) -> bool:
        """Whether values are a view of keys."""
        return self.values.data_ptr() == self.keys.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes if self.is_latent else self.keys.nbytes + self.values.nbytes

    def write(
        self, k_TKH: torch.Tensor, v_TKH: torch.Tensor, blocks_T: torch.Tensor, at_T: torch.Tensor
    ) -> None:
        """Store each token's keys and values at its block and offset.

        Values are made finite: a masked position weighs 0, and 0 x NaN would reach whoever takes
        over the block of a sequence that went wrong.
        """
        self.keys[blocks_T, :, at_T] = k_TKH
        self.values[blocks_T, :, at_T] = v_TKH.nan_to_num()

    def write_latents(
        self, k_TKH: torch.Tensor, blocks_T: torch.Tensor, at_T: torch.Tensor
    ) -> None:
        """The same where values are a view of keys."""
        self.keys[blocks_T, :, at_T] = k_TKH.nan_to_num()

    def copy(self, sources_N: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Copy whole blocks. All are read before any is written; targets are distinct."""
        self.keys[targets_N] = self.keys[sources_N]
        if not self.is_latent:
            self.values[targets_N] = self.values[sources_N]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host, memory that the kernel hands out page by page as blocks are first written:
    `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    elements = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(elements).view(dtype).view(shape)
