"""Collectives inside one process: a group of one, and ranks that live on threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from shards.collectives.arguments import (
    check_in_place,
    check_place,
    check_sum,
    check_widths,
)
from shards.collectives.ordered_sum import ordered_sum
from shards.errors import CollectiveAborted, CollectiveTimeout


class Local:
    """A group of one rank (tensor_parallel 1): nothing to add, move or wait for.

    Works on any device. The gathers return a copy, so that the result is always the caller's own.
    """

    rank = 0
    world = 1

    def __init__(self) -> None:
        self._aborted = False

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        self.barrier()
        return x_TD

    def all_gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        check_widths(x_TN, widths, 0, 1)
        self.barrier()
        return x_TN.clone(memory_format=torch.contiguous_format)

    def gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return self.all_gather(x_TN, widths)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self.barrier()
        return x

    def barrier(self) -> None:
        if self._aborted:
            raise CollectiveAborted("the group was aborted or closed")

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._aborted = True


class ThreadGroup:
    """Makes the collectives of `world` ranks on threads of one process, for tests and debugging.

    `group[rank]` is rank's `Collective`, with the semantics, deadline and abort of the real ones.

    Args:
        world: number of ranks.
        deadline_s: seconds that one call may wait for the others.
    """

    def __init__(self, world: int, deadline_s: float) -> None:
        exchange = _Exchange(world, deadline_s)
        self._ranks = tuple(_ThreadRank(exchange, rank) for rank in range(world))

    def __len__(self) -> int:
        return len(self._ranks)

    def __getitem__(self, rank: int) -> _ThreadRank:
        return self._ranks[rank]


class _Exchange:
    """Hands every rank the tensors that all ranks offered in the same call."""

    def __init__(self, world: int, deadline_s: float) -> None:
        for rank in range(world):
            check_place(rank, world, deadline_s)
        self.world = world
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._calls = [0] * world
        self._offers: dict[int, list[torch.Tensor | None]] = {}
        self._ended: str | None = None
        self._late: int | None = None

    def swap(self, rank: int, offer: torch.Tensor | None) -> list[torch.Tensor]:
        """Blocks until every rank has offered. What is offered must not change afterwards."""
        with self._changed:
            self._require_alive()
            call = self._calls[rank]
            self._calls[rank] = call + 1
            offers = self._offers.setdefault(call, [None] * self.world)
            offers[rank] = offer
            if min(self._calls) > call:
                del self._offers[call]  # the waiting ranks hold the list itself
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._ended is not None or min(self._calls) > call, self._deadline_s
            )
            if min(self._calls) <= call:
                if self._ended is None:
                    self._late = self._calls.index(min(self._calls))
                    self.end(
                        f"rank {self._late} of {self.world} did not arrive "
                        f"within {self._deadline_s:g} s"
                    )
                self._require_alive()
            return [tensor for tensor in offers if tensor is not None]

    def end(self, reason: str) -> None:
        with self._changed:
            self._ended = self._ended or reason
            self._changed.notify_all()

    def _require_alive(self) -> None:
        if self._ended is None:
            return
        if self._late is None:
            raise CollectiveAborted(self._ended)
        raise CollectiveTimeout(self._ended, self._late)


class _ThreadRank:
    def __init__(self, exchange: _Exchange, rank: int) -> None:
        self.rank = rank
        self.world = exchange.world
        self._exchange = exchange
        self._closed = False

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        check_sum(x_TD)
        check_in_place(x_TD, "cpu")
        terms = self._swap(x_TD.clone())
        return x_TD.copy_(ordered_sum(terms))

    def all_gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        check_widths(x_TN, widths, self.rank, self.world)
        return torch.cat(self._swap(x_TN.clone()), -1)

    def gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        joined_TN = self.all_gather(x_TN, widths)
        return joined_TN if self.rank == 0 else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        check_in_place(x, "cpu")
        return x.copy_(self._swap(x.clone())[0])

    def barrier(self) -> None:
        self._swap(None)

    def abort(self) -> None:
        self._exchange.end(f"rank {self.rank} aborted the group")

    def close(self) -> None:
        self._closed = True

    def _swap(self, offer: torch.Tensor | None) -> list[torch.Tensor]:
        if self._closed:
            raise CollectiveAborted("the group was aborted or closed")
        return self._exchange.swap(self.rank, offer)
