"""What every collective offers the ranks of one epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Collective(Protocol):
    """Sums and moves tensors between the ranks of a group, in the same order on every rank.

    Every call has the group's deadline. It raises `CollectiveTimeout` (naming the rank that did not
    arrive, where the transport knows), or `CollectiveAborted` after `abort()`; after either the
    group is spent. Results are bitwise equal on every rank: ranks are summed in rank order, except
    by nccl, which sums in an order of its own and whose failures may surface at a later call.
    """

    rank: int
    world: int

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; contiguous, any shape, any float dtype. Returns `x_TD`."""
        ...

    def all_gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Concatenate along the last axis; rank r's slice is `widths[r]` wide. A new tensor."""
        ...

    def gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """As `all_gather`, on rank 0 only; None elsewhere. What logits take."""
        ...

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values to all, in place; any dtype. Returns `x`."""
        ...

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """Unblock every rank of the group, from any thread; idempotent."""
        ...

    def close(self) -> None:
        """Give back what this rank holds; idempotent."""
        ...
