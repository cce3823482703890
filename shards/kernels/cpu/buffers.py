"""The memory that a program's instructions read and write."""

from __future__ import annotations

import torch

from shards.kernels.base import Limits
from shards.kernels.cpu.attention import AttentionScratch
from shards.kernels.cpu.experts import Pairs


class Buffers:
    """A program's memory. What has the same name and size is the same: every layer uses it in
    turn."""

    def __init__(self, limits: Limits, threads: int) -> None:
        self._limits = limits
        self._threads = threads
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._rooms: dict[int, torch.Tensor] = {}
        self._scratch: dict[int, AttentionScratch] = {}
        self._pairs: dict[tuple[int, int], Pairs] = {}

    def rows(self, name: str, width: int, count: int | None = None) -> torch.Tensor:
        """float32 [count, width]; by default as many rows as a step may have."""
        if (name, width) not in self._rows:
            self._rows[name, width] = torch.zeros(count or self._limits.rows, width)
        return self._rows[name, width]

    def room(self, size: int) -> torch.Tensor:
        """uint8 [size], for the length of an instruction."""
        if size not in self._rooms:
            self._rooms[size] = torch.empty(size, dtype=torch.uint8)
        return self._rooms[size]

    def attention(self, head_dim: int) -> AttentionScratch:
        if head_dim not in self._scratch:
            self._scratch[head_dim] = AttentionScratch(head_dim, self._threads)
        return self._scratch[head_dim]

    def pairs(self, experts: int, top_k: int) -> Pairs:
        """Of tokens and the experts chosen for them."""
        key = experts, self._limits.rows * top_k
        if key not in self._pairs:
            self._pairs[key] = Pairs(*key)
        return self._pairs[key]
