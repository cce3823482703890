"""Decode steps as graphs: one for each rung of the ladder, captured before the first request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shards.batch import Batch
from shards.kernels.cuda.epoch import Epoch
from shards.kernels.cuda.graphs import Capture
from shards.kernels.cuda.ladder import rung
from shards.kernels.cuda.padding import is_decode
from shards.kernels.cuda.step import Inputs
from shards.timing import PhaseTimer


class CapturedDecodes:
    """Decodes of up to the highest of `rungs` rows: the whole step, logits of every row included.

    The largest is captured first: the smaller then find room in the memory that it left.
    """

    def __init__(self, epoch: Epoch, rungs: Sequence[int], capture: Capture) -> None:
        self._rungs = rungs
        self._logits_SV: torch.Tensor | None = None
        self._graphs = {
            rows: _CapturedDecode(epoch, rows, capture, self._keep) for rows in reversed(rungs)
        }

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits [T, V] of a step, overwritten by the next; None for a step that is no decode or
        has more rows than any graph."""
        rows = rung(self._rungs, len(batch.tokens_T)) if is_decode(batch) else None
        if rows is None or self._logits_SV is None:
            return None
        self._graphs[rows].run(batch)
        return self._logits_SV[: len(batch.tokens_T)]

    def _keep(self, logits_SV: torch.Tensor) -> None:
        """One buffer for all graphs: kept apart, their logits would take gigabytes."""
        if self._logits_SV is None:
            self._logits_SV = torch.empty_like(logits_SV)
        self._logits_SV[: len(logits_SV)].copy_(logits_SV)


class _CapturedDecode:
    def __init__(
        self, epoch: Epoch, rows: int, capture: Capture, keep: Callable[[torch.Tensor], None]
    ) -> None:
        self._epoch = epoch
        self._rows = rows
        self._keep = keep
        self._mirror = epoch.mirror(fixed=True)
        self._attention = epoch.attention.captured(rows)
        self._inputs = self._load(epoch.scratch_decode(rows))
        self._replay = capture(self._compute)

    def run(self, batch: Batch) -> None:
        self._load(self._epoch.padded(batch, self._rows))
        self._replay()

    def _load(self, batch: Batch) -> Inputs:
        self._attention.plan(batch)
        return Inputs.of(batch, self._mirror)

    def _compute(self) -> None:
        epoch = self._epoch
        step = epoch.step(self._inputs, self._attention, PhaseTimer())
        hidden_TD = epoch.decoder.hidden(step, epoch.caches)
        self._keep(epoch.decoder.logits(step, hidden_TD))
