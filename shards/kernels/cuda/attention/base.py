"""What the CUDA kernels ask of an attention library.

Shape letters: T rows, S sequences, N query heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from shards.batch import Batch
from shards.kernels.base import Pattern
from shards.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class Geometry:
    """What an epoch's caches look like: the head_dim of every layer, tokens to a block, blocks to
    the longest table, the dtype of queries, keys and values. `plain`: no layer asks for more than
    `Pattern.is_plain`, and values have memory of their own."""

    head_dims: frozenset[int]
    block_size: int
    blocks: int
    dtype: torch.dtype
    device: torch.device
    plain: bool = True


class StepAttention(Protocol):
    """Attention of one step at a time, all of its layers."""

    def plan(self, batch: Batch) -> None:
        """Make ready for a step; never inside a graph. The step's keys need not be written yet."""
        ...

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        """`Sentences.attend` for the planned step: [T, N, H].

        Inside a graph, only for patterns that it has seen outside of one: their first call plans.
        """
        ...


class AttentionBackend(Protocol):
    """An attention library, for the caches of one epoch."""

    name: str

    def captures(self, rows: int) -> bool:
        """Whether a decode of so many rows may run in a graph; the same on every rank."""
        ...

    def captured(self, rows: int) -> StepAttention:
        """For decodes of exactly `rows` rows, whose addresses never change."""
        ...

    def eager(self) -> StepAttention:
        """For any step, outside of graphs."""
        ...
