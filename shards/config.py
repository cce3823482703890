"""What a rank is told when it is started. A leaf: no torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass

from shards.collectives import Transport
from shards.layout import Layout
from shards.models.source import ModelSource
from shards.quantization.choice import Quantization


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """What a rank must know to load and serve; picklable.

    `device` is "cpu" or "cuda:0". `host_ranks` ranks share this one's host, and thus its memory.
    `threads` 0 is an even share of the host's. `kv_memory` is in bytes, None for a share of what is
    left. `collective` is a name that `shards.collectives.choose` answers.
    """

    source: ModelSource
    layout: Layout
    rank: int
    dtype: str
    quantization: Quantization
    device: str
    threads: int
    host_ranks: int
    block_size: int
    max_sequences: int
    max_step_tokens: int
    context: int
    kv_memory: int | None
    collective: Transport
    deadline_s: float
