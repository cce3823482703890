"""Steps of an epoch on a GPU: decodes as graphs, all others eagerly."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from shards.batch import Batch, Int64
from shards.kernels.base import Limits
from shards.kernels.cuda.decodes import CapturedDecodes
from shards.kernels.cuda.device import DeviceError
from shards.kernels.cuda.epoch import Epoch
from shards.kernels.cuda.graphs import Capture
from shards.kernels.cuda.ladder import ladder
from shards.kernels.cuda.padding import scratch_prefill
from shards.kernels.cuda.step import CudaStep, Inputs
from shards.timing import PhaseTimer


class CudaExecutor:
    """Without a `capture` every step is eager.

    All that is slow the first time (capture, compilation, choice of kernels) happens in here, in
    the same order on every rank: the collectives in it must meet. Raises `DeviceError` where ranks
    would not compute in the same steps.
    """

    @torch.inference_mode()
    def __init__(self, epoch: Epoch, limits: Limits, capture: Capture | None) -> None:
        self._epoch = epoch
        self._attention = epoch.attention.eager()
        self._mirror = epoch.mirror(fixed=False)
        self._step: CudaStep | None = None
        self._hidden_TD = torch.empty(0)
        self._decoded_TV: torch.Tensor | None = None
        rungs = () if capture is None else self._rungs(limits.sequences)
        self._agree(rungs)
        self._decodes: CapturedDecodes | None = None
        if capture is not None:
            self._warm_up()
            self._decodes = CapturedDecodes(epoch, rungs, capture)

    @torch.inference_mode()
    def forward(self, batch: Batch, timer: PhaseTimer) -> None:
        self._decoded_TV = None if self._decodes is None else self._decodes.run(batch)
        if self._decoded_TV is not None:
            timer.mark("output")  # the host launches one thing and cannot tell phases apart
            return
        self._attention.plan(batch)
        self._step = self._epoch.step(Inputs.of(batch, self._mirror), self._attention, timer)
        self._hidden_TD = self._epoch.decoder.hidden(self._step, self._epoch.caches)

    @torch.inference_mode()
    def logits(self, rows_S: Int64, timer: PhaseTimer) -> torch.Tensor:
        decoded_TV = self._decoded_TV
        if decoded_TV is not None:
            if np.array_equal(rows_S, np.arange(len(decoded_TV))):
                return decoded_TV
            return decoded_TV[self._mirror.put("rows", rows_S)]
        if self._step is None:
            raise RuntimeError("asked for logits before a step")
        x_SD = self._hidden_TD[self._mirror.put("rows", rows_S)]
        logits_SV = self._epoch.decoder.logits(self._step, x_SD)
        timer.mark("output")
        return logits_SV

    def _rungs(self, sequences: int) -> tuple[int, ...]:
        return tuple(rows for rows in ladder(sequences) if self._epoch.attention.captures(rows))

    def _warm_up(self) -> None:
        """The first eager step would compile and choose kernels under a request's eyes."""
        timer = PhaseTimer()
        self.forward(scratch_prefill(self._epoch.geometry.block_size, self._epoch.scratch), timer)
        self.logits(np.zeros(1, np.int64), timer)

    def _agree(self, rungs: tuple[int, ...]) -> None:
        """Ranks that padded a step differently would sum tensors of different shapes."""
        collective, attention = self._epoch.collective, self._epoch.attention.name
        checksum = zlib.crc32(repr((attention, rungs)).encode())
        own = torch.tensor([checksum], device=self._epoch.geometry.device)
        checksums = collective.all_gather(own, [1] * collective.world).tolist()
        other = next((rank for rank, sum_ in enumerate(checksums) if sum_ != checksum), None)
        if other is not None:
            raise DeviceError(
                f"rank {collective.rank} computes attention with {attention} and decodes in "
                f"{len(rungs)} graphs, rank {other} does otherwise: install the same packages on "
                "every host, or name attention=sdpa"
            )
