"""Collectives between the ranks of one host, over one memory mapping.

`segment` says what the mapping holds and how the driver makes it, `kernel` how the ranks use it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from shards.collectives import kernel, segment
from shards.collectives.arguments import check_in_place, check_place, check_widths
from shards.collectives.kernel import warm_up
from shards.collectives.segment import abort_segment, create_segment, segment_size
from shards.errors import CollectiveAborted, CollectiveError, CollectiveTimeout

__all__ = ["SharedMemory", "abort_segment", "create_segment", "segment_size", "warm_up"]

_KINDS = {  # dtype: bytes, code
    torch.float32: (4, kernel.FLOAT32),
    torch.float64: (8, kernel.FLOAT64),
    torch.bfloat16: (2, kernel.BFLOAT16),
    torch.float16: (2, kernel.FLOAT16),
}


class SharedMemory:
    """One rank of a group whose ranks all map the segment behind `fd`. See `Collective`.

    All that is promised there holds. float16 and bfloat16 are summed in float32 and rounded once,
    as in `ThreadGroup`, to the same bits. A time-out names the rank that is furthest behind, the
    same one on every rank. A dead rank shows by the deadline alone, unless the driver, which knows
    earlier, calls `abort_segment`. Where `T` or a tensor is empty a call does not synchronise.

    The first one of a process compiles the kernels: about ten seconds once, then some 0.3 s from
    the cache of `shards/compile_cache.py`. `warm_up()` does it ahead of time.

    `abort` may come from any thread. `close` may not run while a call is in flight.

    Args:
        fd: a descriptor of a segment made for this epoch alone; the caller closes it.
        rank, world: this rank of so many; `world` as given to `create_segment`.
        deadline_s: seconds that one call may wait for the others.

    Raises `CollectiveError` where `fd`, `rank` and `world` do not fit together.
    """

    def __init__(self, fd: int, rank: int, world: int, deadline_s: float) -> None:
        check_place(rank, world, deadline_s)
        header = segment.read_header(fd)
        if world != header.world:
            raise CollectiveError(f"world={world}: the segment was made for {header.world} ranks")
        if header.counters[rank]:
            raise CollectiveError(f"rank {rank} of this segment is used: create one per epoch")
        warm_up()
        self.rank = rank
        self.world = world
        self._deadline_s = deadline_s
        self._lock = threading.Lock()  # abort against close
        self._mapping: mmap.mmap | None = mmap.mmap(
            fd, header.size, mmap.MAP_SHARED | mmap.MAP_POPULATE
        )
        self._base = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self._tile = np.empty(kernel.TILE, np.float64)
        self._clock = np.zeros(2, np.int64)
        self._closed_word = np.array([kernel.ABORTED])
        self._state = np.zeros(1, kernel.STATE)
        state = self._state[0]
        state["rank"] = rank
        state["world"] = world
        state["slot_bytes"] = header.slot_bytes
        state["abort_address"] = self._base + segment.ABORT
        state["counters_address"] = self._base + segment.COUNTERS
        state["line"] = segment.LINE
        state["slots_address"] = self._base + segment.slots_offset(world)
        state["tile_address"] = self._tile.ctypes.data
        state["clock_address"] = self._clock.ctypes.data
        state["deadline_ns"] = int(deadline_s * 1e9)
        self._address = self._state.ctypes.data

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        kind = _KINDS.get(x_TD.dtype)
        if kind is None:
            raise ValueError(f"all_reduce of {x_TD.dtype}: only {', '.join(map(str, _KINDS))}")
        check_in_place(x_TD, "cpu")
        self.check(kernel.all_reduce(self._address, x_TD.data_ptr(), x_TD.numel(), *kind))
        return x_TD

    def all_gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        joined_TN = x_TN.new_empty(*x_TN.shape[:-1], sum(widths))
        self._gather(x_TN, widths, joined_TN, to_all=True)
        return joined_TN

    def gather(self, x_TN: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        joined_TN = x_TN.new_empty(*x_TN.shape[:-1], sum(widths)) if self.rank == 0 else None
        self._gather(x_TN, widths, joined_TN, to_all=False)
        return joined_TN

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        check_in_place(x, "cpu")
        self.check(kernel.broadcast(self._address, x.data_ptr(), x.nbytes))
        return x

    def barrier(self) -> None:
        self.check(kernel.barrier(self._address))

    def abort(self) -> None:
        with self._lock:
            if self._mapping is not None:
                kernel.abort(self._base + segment.ABORT)

    def close(self) -> None:
        with self._lock:
            if self._mapping is None:
                return
            # A later call finds an abort word that is set, and never the memory that is gone.
            self._state[0]["abort_address"] = self._closed_word.ctypes.data
            self._mapping.close()
            self._mapping = None

    def _gather(
        self,
        x_TN: torch.Tensor,
        widths: Sequence[int],
        joined_TN: torch.Tensor | None,
        *,
        to_all: bool,
    ) -> None:
        check_widths(x_TN, widths, self.rank, self.world)
        x_TN = x_TN.contiguous()
        check_in_place(x_TN, "cpu")
        row_bytes = np.array(widths, np.int64) * x_TN.element_size()
        target = 0 if joined_TN is None else joined_TN.data_ptr()
        rows = prod(x_TN.shape[:-1])
        self.check(
            kernel.gather(
                self._address, x_TN.data_ptr(), target, rows, row_bytes.ctypes.data, int(to_all)
            )
        )

    @property
    def state_address(self) -> int:
        """Of the group's `kernel.STATE`, for compiled code that calls `kernel.all_reduce`."""
        return self._address

    def check(self, status: int) -> None:
        """Raise what a kernel's status stands for."""
        if status == kernel.OK:
            return
        if status == kernel.ABORTED:
            raise CollectiveAborted("the shared-memory group was aborted or closed")
        late = status - kernel.TIMED_OUT
        raise CollectiveTimeout(
            f"rank {late} of {self.world} did not arrive within {self._deadline_s:g} s", late
        )
