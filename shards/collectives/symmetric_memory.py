"""Small sums between the GPUs of one host, through memory that each can read of the others.

A decode step's messages are a few kilobytes, for which NCCL's latency is most of the time. Written
against torch 2.13 and not yet run: no GPU was at hand.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Literal

import structlog
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import GroupName

from shards.collectives.arguments import check_in_place, check_sum
from shards.collectives.nccl import Nccl

log = structlog.get_logger(__name__)

Algorithm = Literal["one_shot", "two_shot", "multimem"]

# Up to here each rank reads all terms of all values: one exchange of signals before, one after.
ONE_SHOT_BYTES = 128 << 10
# Up to here each rank sums a part and hands it out; beyond it NCCL has the bandwidth.
LARGEST_BYTES = 1 << 20
# One-shot kernels that add in rank order on every rank exist for these worlds only.
_ORDERED_WORLDS = (2, 4, 8)
_DTYPES = (torch.float32, torch.bfloat16)
_ALIGNED = 16  # bytes that a thread loads at a time


def algorithm(x: torch.Tensor, world: int, *, multicast: bool) -> Algorithm | None:
    """How to sum `x`; None where NCCL is to do it. Pure, so that every rank decides alike.

    With `multicast` the switch adds (NVLink SHARP). All three leave the same bits on every rank.
    """
    misaligned = x.nbytes % _ALIGNED or x.storage_offset() * x.itemsize % _ALIGNED
    if x.dtype not in _DTYPES or misaligned or not 0 < x.nbytes <= LARGEST_BYTES:
        return None
    if multicast:
        return "multimem"
    return "one_shot" if x.nbytes <= ONE_SHOT_BYTES and world in _ORDERED_WORLDS else "two_shot"


class SymmetricMemory(Nccl):
    """An NCCL group whose small sums take PyTorch's symmetric memory; see `Nccl`.

    Where the GPUs cannot read each other's memory, on any rank, all sums take NCCL. These calls may
    be captured into graphs as NCCL's may. They are not watched themselves: a rank that hangs in one
    is noticed by the NCCL call that it does not come to, and a group that ends lets go of the
    kernels that wait for it.
    """

    def __init__(
        self,
        rendezvous: str,
        epoch: int,
        rank: int,
        world: int,
        deadline_s: float,
        device: torch.device,
    ) -> None:
        self._name = GroupName(f"headwise-{epoch}")
        self._registered: dist.ProcessGroup | None = None
        self._buffer: torch.Tensor | None = None
        self._handle: Any = None
        super().__init__(rendezvous, epoch, rank, world, deadline_s, device)
        self._stream = torch.cuda.current_stream(device)  # where steps run, graphs included
        self._open()

    def all_reduce(self, x_TD: torch.Tensor) -> torch.Tensor:
        how = None
        if self._handle is not None:
            how = algorithm(x_TD, self.world, multicast=bool(self._handle.multicast_ptr))
        if how is None or self._buffer is None:
            return super().all_reduce(x_TD)
        check_sum(x_TD)
        check_in_place(x_TD, "cuda")
        if self._ended is not None:
            self._fail(self._ended)
        self._calls += 1
        x = x_TD.view(-1)
        shared = self._buffer.view(x.dtype)[: x.numel()]
        if how == "one_shot":
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, x, "sum", self._name, out=x)
            return x_TD
        shared.copy_(x)
        if how == "two_shot":
            torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._name)
        else:
            torch.ops.symm_mem.multimem_all_reduce_(shared, "sum", self._name)
        x.copy_(shared)
        return x_TD

    def _open(self) -> None:
        """Map a buffer of every rank into every other, or none at all."""
        import torch.distributed._symmetric_memory as symmetric_memory

        # Each rank's process sees one GPU, and calls it cuda:0.
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        buffer = handle = cause = None
        try:
            self._register()
            buffer = symmetric_memory.empty(LARGEST_BYTES, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            cause = error
        # Joined by all or by none: a rank that waited for one that cannot would hang.
        if self._all(buffer is not None) and buffer is not None:
            try:
                handle = symmetric_memory.rendezvous(buffer, self._name)
            except RuntimeError as error:
                cause = error
            if self._all(handle is not None):
                self._buffer, self._handle = buffer, handle
        if self._handle is None:
            reason = "another rank has none" if cause is None else str(cause)
            log.warning("no symmetric memory: all sums take NCCL", rank=self.rank, reason=reason)

    def _register(self) -> None:
        """Symmetric memory finds its group by name in torch's registry."""
        store = PrefixStore("symmetric_memory", self._meeting.store)
        group = dist.ProcessGroup(store, self.rank, self.world)
        group._register_backend(self._device, dist.ProcessGroup.BackendType.NCCL, self._group)
        group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        group._set_group_name(self._name)
        _register_process_group(self._name, group)
        self._registered = group

    def _all(self, fact: bool) -> bool:
        votes = torch.tensor([float(fact)], device=self._device)
        return int(super().all_reduce(votes).item()) == self.world

    def _leave(self) -> None:
        if self._handle is not None:
            # Beside the abort of NCCL's group: either may wait for kernels that the other lets go.
            threading.Thread(target=self._release, name="symmetric-release", daemon=True).start()
        super()._leave()
        if self._registered is not None:
            _unregister_process_group(self._name)
            self._registered = None

    def _release(self) -> None:
        """Let kernels go on that wait for a rank that is gone, with whatever there is.

        They wait until every peer has set its word in this rank's signal pad, and until the words
        that they set themselves in their peers' pads were taken back: both are done for them here,
        again and again, since a graph may hold many such kernels in a row.
        """
        expiry = time.monotonic() + self._deadline_s
        pads = [self._handle.get_signal_pad(rank, dtype=torch.int32) for rank in range(self.world)]
        with torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
            while not self._stream.query() and time.monotonic() < expiry:
                for rank, pad in enumerate(pads):
                    pad.fill_(rank == self.rank)
                torch.cuda.current_stream(self._device).synchronize()
