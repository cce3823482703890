"""Where a program reads the numbers of its step."""

from __future__ import annotations

import numpy as np

from shards.batch import Batch
from shards.kernels.base import Limits


class Inputs:
    """Where a step's numbers lie; see `shards.batch.Batch`. `sampled`: the rows of the logits."""

    def __init__(self, limits: Limits) -> None:
        self.tokens, self.positions, self.blocks, self.offsets = np.zeros(
            (4, limits.rows), np.int64
        )
        self.spans = np.zeros((limits.rows, 4), np.int64)
        self.tables = np.zeros((limits.sequences, limits.blocks), np.int64)
        self.sampled = np.zeros(limits.sampled, np.int64)
        self.batch: Batch | None = None

    def current(self) -> Batch:
        """The step that is being computed, for what does not read it from buffers."""
        if self.batch is None:
            raise RuntimeError("asked to compute before a step")
        return self.batch
