"""Collectives between GPUs, by NCCL.

Written against torch 2.13 and not yet run: no GPU was at hand.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shards.collectives.arguments import check_in_place, check_sum
from shards.collectives.process_group import ProcessGroup
from shards.collectives.rendezvous import TIMED_OUT
from shards.errors import CollectiveError

_WATCH_S = 0.1


class Nccl(ProcessGroup):
    """One rank of an NCCL group on CUDA `device`; see `ProcessGroup` for the other arguments.

    Calls are enqueued on the current stream and return before they are done; only `barrier` blocks
    the host. So a missing rank shows later: a watchdog thread ends the group once a call has been
    under way for the deadline, or when any rank has ended it, which lets the kernels that hang on
    the GPU return; the next call, and every one after it, raises. What was computed since the last
    `barrier` that succeeded must then be thrown away. Calls captured into a CUDA graph are not
    watched when it is launched; the next call outside of it is, which waits for the graph.

    Sums have the same bits on every rank. Their order is NCCL's choice of algorithm, not that of
    the ranks, and 16-bit types are rounded at every hop: that much of `Collective` is relaxed here.
    """

    device_type = "cuda"

    def __init__(
        self,
        rendezvous: str,
        epoch: int,
        rank: int,
        world: int,
        deadline_s: float,
        device: torch.device,
    ) -> None:
        if not dist.is_nccl_available() or not torch.cuda.is_available():
            raise CollectiveError(
                "collective=nccl: this torch has no NCCL or sees no GPU; use gloo or shared_memory"
            )
        # Its own watchdog would end the process, and with it the weights that survivors keep.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        self._device = device
        self._under_way: deque[tuple[Any, float]] = deque()
        self._closed = threading.Event()
        torch.cuda.set_device(device)
        super().__init__(rendezvous, epoch, rank, world, deadline_s)
        threading.Thread(target=self._watch, name="nccl-watchdog", daemon=True).start()

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        check_sum(x_TD)
        check_in_place(x_TD, "cuda")
        if x_TD.numel():
            self._run(lambda group: group.allreduce([x_TD]))
        return x_TD

    def barrier(self) -> None:
        super().barrier()
        torch.cuda.current_stream(self._device).synchronize()
        if self._ended is not None:
            self._fail(self._ended)

    def _make_group(self, rendezvous: str) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._deadline_s)
        group = dist.ProcessGroupNCCL(self._meeting.store, self.rank, self.world, options)
        # Connect now, under the deadline of joining, and not within the first step.
        group.eager_connect_single_device(self._device)
        return group

    def _complete(self, work: Any) -> None:
        work.wait()  # the current stream waits, not the host
        if not torch.cuda.is_current_stream_capturing():
            self._under_way.append((work, time.monotonic()))

    def _leave(self) -> None:
        self._closed.set()
        group, self._group = self._group, None
        group.abort()

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            while self._under_way and self._under_way[0][0].is_completed():
                self._under_way.popleft()
            why = self._meeting.ended()
            if why is None and self._under_way:
                started = self._under_way[0][1]
                why = TIMED_OUT if time.monotonic() - started >= self._deadline_s else None
            if why is not None:
                self._meeting.end(why)
                self._end(why)
