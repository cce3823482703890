"""Collectives over TCP between hosts without a GPU network, by gloo."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shards.collectives.arguments import check_in_place, check_sum
from shards.collectives.ordered_sum import ordered_sum
from shards.collectives.process_group import ProcessGroup, as_bytes
from shards.collectives.rendezvous import LOST, TIMED_OUT, local_address

# How long a wait lasts before it looks whether the group has been given up.
_SLICE = timedelta(milliseconds=50)

# Up to here, and always between two ranks, every rank receives every term: half the messages.
_DIRECT_BYTES = 128 << 10


class Gloo(ProcessGroup):
    """One rank of a gloo group, on the CPU; see `ProcessGroup` for the arguments.

    All that `Collective` promises holds: gloo only moves the terms, each rank adds them in rank
    order, so that the sums have the same bits on every rank and as in `SharedMemory`. (That is also
    several times faster here than gloo's own all-reduce, whose ring has twice the messages.)

    A dead peer is noticed in milliseconds by its neighbours and, through the store, within ~50 ms
    by all others; it is named where it alone is silent. gloo itself cannot be interrupted: after
    `abort`, or a deadline, calls return within ~50 ms, while gloo's threads end by themselves at
    the deadline, apart from any group made after it.

    It listens where it reaches the store from, on loopback where that is loopback;
    GLOO_SOCKET_IFNAME names another interface.
    """

    device_type = "cpu"
    _under_way: Any = None  # what the rank waits for

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        check_sum(x_TD)
        check_in_place(x_TD, "cpu")
        if x_TD.numel() == 0:
            return x_TD
        if self.world == 2 or x_TD.nbytes <= _DIRECT_BYTES:
            terms = x_TD.new_empty(self.world, *x_TD.shape)
            self._run(lambda group: group._allgather_base(as_bytes(terms), as_bytes(x_TD)))
            return x_TD.copy_(ordered_sum(terms))
        return self._reduce_by_parts(x_TD)

    def _reduce_by_parts(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Each rank receives and adds the terms of one part of x, then all collect the parts."""
        width = -(-x_TD.numel() // self.world)
        padded = x_TD.new_zeros(self.world, width)
        padded.view(-1)[: x_TD.numel()] = x_TD.view(-1)
        terms = torch.empty_like(padded)
        self._run(lambda group: group.alltoall_base(as_bytes(terms), as_bytes(padded), [], []))
        part = ordered_sum(terms).to(x_TD.dtype)
        self._run(lambda group: group._allgather_base(as_bytes(padded), as_bytes(part)))
        x_TD.view(-1).copy_(padded.view(-1)[: x_TD.numel()])
        return x_TD

    def _make_group(self, rendezvous: str) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=self._deadline_s)
        options._threads = 1
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        with _on_any_core():
            if interface:
                device = gloo.create_device(interface=interface)
            else:
                address = local_address(rendezvous)
                device = gloo.create_device(hostname=address)
            options._devices = [device]
            return gloo(self._meeting.store, self.rank, self.world, options)

    def _complete(self, work: Any) -> None:
        expiry = time.monotonic() + self._deadline_s
        self._under_way = work
        while True:
            over = work.is_completed()  # then an error is the work's, not the end of a slice
            try:
                work.wait(_SLICE)
                self._under_way = None
                return
            except RuntimeError as error:
                late = time.monotonic() >= expiry
                if over:
                    self._fail(TIMED_OUT if late else LOST, error)
            why = self._ended or self._meeting.ended() or (TIMED_OUT if late else None)
            if why is not None and not work.is_completed():
                self._fail(why)

    def _leave(self) -> None:
        group, self._group = self._group, None
        if self._under_way is not None:
            waiting = (group, self._under_way)
            threading.Thread(target=_outlive, args=waiting, name="gloo-leave", daemon=True).start()


def _outlive(group: Any, work: Any) -> None:
    """Hold a group until its last call is over, for its destructor would block until then."""
    while not work.is_completed():
        time.sleep(0.1)


@contextmanager
def _on_any_core() -> Iterator[None]:
    """gloo's threads inherit the caller's cores. On a pinned rank's only core they would take
    turns with it: three times the latency."""
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)
