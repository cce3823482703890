"""What gloo and nccl have in common: moving bytes through one of torch's process groups.

The groups are torch's own objects, made without `init_process_group`: nothing global remains, so a
process leaves a broken group and builds that of the next epoch beside it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from shards.collectives.arguments import check_in_place, check_place, check_widths
from shards.collectives.rendezvous import ABORTED, LOST, TIMED_OUT, Meeting
from shards.errors import CollectiveAborted, CollectiveError, CollectiveTimeout


class ProcessGroup(ABC):
    """See `Collective`; the subclasses say what they guarantee.

    Args:
        rendezvous: "host:port" of the driver's `host_store`.
        epoch: a number that no earlier group at this store has had.
        rank, world: this rank of so many.
        deadline_s: seconds that one call, and joining, may take.

    Joining raises `CollectiveTimeout`, naming the first rank that did not come, or
    `CollectiveError` where the store is out of reach.
    """

    device_type: str

    def __init__(
        self, rendezvous: str, epoch: int, rank: int, world: int, deadline_s: float
    ) -> None:
        check_place(rank, world, deadline_s)
        self.rank = rank
        self.world = world
        self._deadline_s = deadline_s
        self._calls = 0
        self._ended: str | None = None
        self._lock = threading.Lock()  # one thread leaves
        self._meeting = Meeting(rendezvous, epoch, rank, world, deadline_s)
        self._meeting.join()
        try:
            self._group: Any = self._make_group(rendezvous)
        except RuntimeError as error:
            absent = self._meeting.not_joined()
            if absent:
                raise CollectiveTimeout(
                    f"rank {absent[0]} of {world} did not join epoch {epoch} "
                    f"within {deadline_s:g} s",
                    absent[0],
                ) from error
            raise CollectiveError(f"rank {rank} could not join epoch {epoch}: {error}") from error

    @abstractmethod
    def _make_group(self, rendezvous: str) -> Any:
        """The torch process group of this epoch, connected or about to be."""

    @abstractmethod
    def _complete(self, work: Any) -> None:
        """Wait as the transport does; `_fail` where the group has ended."""

    @abstractmethod
    def _leave(self) -> None:
        """Give up the connections, without waiting for anyone. Once, from any thread."""

    @abstractmethod
    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        sent = self._padded(x_TN, widths)
        parts = x_TN.new_empty(self.world, *sent.shape)
        if sent.numel():
            self._run(lambda group: group._allgather_base(as_bytes(parts), as_bytes(sent)))
        return _joined(parts, widths)

    def gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        sent = self._padded(x_TN, widths)
        parts = x_TN.new_empty(self.world if self.rank == 0 else 0, *sent.shape)
        if sent.numel():
            options = dist.GatherOptions()
            options.rootRank = 0
            received = [[as_bytes(part) for part in parts]] if self.rank == 0 else []
            self._run(lambda group: group.gather(received, [as_bytes(sent)], options))
        return _joined(parts, widths) if self.rank == 0 else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        check_in_place(x, self.device_type)
        if x.numel():
            options = dist.BroadcastOptions()
            options.rootRank = 0
            self._run(lambda group: group.broadcast([as_bytes(x)], options))
        return x

    def barrier(self) -> None:
        self._run(lambda group: group.barrier())

    def abort(self) -> None:
        if self._ended is None:
            self._meeting.end(ABORTED)
            self._end(ABORTED)

    def close(self) -> None:
        self._end(ABORTED)

    def _run(self, start: Callable[[Any], Any]) -> None:
        group = self._group
        if self._ended is not None:
            self._fail(self._ended)
        self._calls += 1
        try:
            work = start(group)
        except RuntimeError as error:
            self._fail(LOST, error)
        self._complete(work)

    def _end(self, why: str) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = why
                self._leave()

    def _fail(self, why: str, cause: BaseException | None = None) -> NoReturn:
        """End the group for all, and say on whose account."""
        if self._ended is None:
            self._meeting.end(why)
            why = self._meeting.ended() or why
        if why == ABORTED:
            self._end(why)
            raise CollectiveAborted("the group was aborted or closed") from cause
        late = self._meeting.roll_call(self._calls)
        self._end(why)
        if why == TIMED_OUT and late:
            raise CollectiveTimeout(
                f"rank {late[0]} of {self.world} did not arrive within {self._deadline_s:g} s",
                late[0],
            ) from cause
        # Of several silent ranks some may only be computing; a guess would be worse than no name.
        suspect = late[0] if len(late) == 1 else None
        subject = "a rank" if suspect is None else f"rank {suspect}"
        error = CollectiveTimeout if why == TIMED_OUT else CollectiveError
        raise error(f"{subject} of {self.world} is gone: the group {why}", suspect) from cause

    def _padded(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The transports exchange equal shapes: every slice as wide as the widest."""
        check_widths(x_TN, widths, self.rank, self.world)
        widest = max(widths)
        if widths[self.rank] < widest:
            x_TN = torch.nn.functional.pad(x_TN, (0, widest - widths[self.rank]))
        x_TN = x_TN.contiguous()
        check_in_place(x_TN, self.device_type)
        return x_TN


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Any type travels as bytes: the transports know only some."""
    return x.view(-1).view(torch.uint8)


def _joined(parts: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)
