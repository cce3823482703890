"""Attention in plain PyTorch, where no attention library is installed; on the CPU, for tests."""

from __future__ import annotations

from typing import ClassVar

import torch

from shards.batch import Batch
from shards.kernels.base import Pattern
from shards.kernels.cuda.attention.base import Geometry
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.reference.attention import DecodeRows, PrefillRows, decode, prefill
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
        self._decode: DecodeRows | None = None
        self._prefills: tuple[PrefillRows, ...] = ()

    def plan(self, batch: Batch) -> None:
        spans_S4, tables = batch.spans_S4, batch.tables
        single = spans_S4[:, 1] == 1
        self._decode = None
        if single.any():
            rows = spans_S4[single]
            width = -(-int(rows[:, 2].max()) // self._block_size)
            self._decode = DecodeRows(
                self._mirror.put("rows", rows[:, 0].copy()),
                self._mirror.put("tables", tables[rows[:, 3], :width]),
                self._mirror.put("contexts", rows[:, 2].copy()),
            )
        self._prefills = tuple(
            PrefillRows(
                first,
                first + count,
                self._mirror.put("table", tables[table, : -(-context // self._block_size)]),
                context,
            )
            for first, count, context, table in spans_S4[~single].tolist()
        )

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        out_TNH = torch.empty_like(q_TNH)
        if self._decode is not None:
            rows = self._decode.rows_S
            out_TNH[rows] = decode(q_TNH[rows], cache, self._decode, pattern)
        for chunk in self._prefills:
            span = slice(chunk.start, chunk.stop)
            out_TNH[span] = prefill(q_TNH[span], cache, chunk, pattern)
        return out_TNH
