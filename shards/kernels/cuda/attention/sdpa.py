"""Attention in plain PyTorch, where no attention library is installed; on the CPU, for tests."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from shards.batch import Batch
from shards.kernels.base import Pattern
from shards.kernels.cuda.attention.base import Geometry
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.reference.attention import DecodeRows, SpanRows, decode
from shards.kv_cache import LayerCache

# A graph cannot know how long contexts will be, so it gathers whole tables. Up to so many tokens
# of all rows together that costs less than launching a step's kernels one by one.
_GATHERED = 1 << 15


class Sdpa:
    """The reference's attention: keys and values are gathered, then multiplied."""

    name = "sdpa"
    module: ClassVar[str | None] = None

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    @staticmethod
    def unfit(geometry: Geometry) -> str | None:
        """It serves every cache."""
        return None

    def captures(self, rows: int) -> bool:
        return rows * self._geometry.blocks * self._geometry.block_size <= _GATHERED

    def captured(self, rows: int) -> GatheredDecode:
        return GatheredDecode(self._geometry)

    def eager(self) -> GatheredSpans:
        return GatheredSpans(self._geometry)


class GatheredDecode:
    """Decodes of a fixed number of rows, each over the whole of its table."""

    def __init__(self, geometry: Geometry) -> None:
        self._mirror = Mirror(geometry.device, fixed=True)
        self._rows: DecodeRows | None = None

    def plan(self, batch: Batch) -> None:
        self._rows = DecodeRows(
            self._mirror.put("rows", batch.spans_S4[:, 0].copy()),
            self._mirror.put("tables", batch.tables[batch.spans_S4[:, 3]]),
            self._mirror.put("contexts", batch.spans_S4[:, 2].copy()),
        )

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        if self._rows is None:
            raise RuntimeError("asked to attend before a plan")
        return decode(q_TNH, cache, self._rows, pattern)


class GatheredSpans:
    """Any step: its decodes together, its chunks of prefill one by one."""

    def __init__(self, geometry: Geometry) -> None:
        self._block_size = geometry.block_size
        self._mirror = Mirror(geometry.device, fixed=False)
        self._rows: SpanRows | None = None

    def plan(self, batch: Batch) -> None:
        self._rows = SpanRows.of(
            batch.spans_S4,
            batch.tables,
            batch.prompts_S,
            self._block_size,
            partial(self._mirror.put, "numbers"),
        )

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        if self._rows is None:
            raise RuntimeError("asked to attend before a plan")
        return self._rows.attend(q_TNH, cache, pattern)
