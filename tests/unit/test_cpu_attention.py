"""Attention over the paged cache on the CPU, against float64 and bit for bit against itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from kernel_launch import launch

from shards.kernels.base import Pattern
from shards.kernels.cpu.attention import AttentionScratch, attention
from shards.kernels.cpu.paged_cache import allocate_cache
from shards.kv_cache import LayerCache

Span = tuple[int, int]  # rows, context


@dataclass
class Step:
    """Spans over a cache of random blocks in random order; the rest of the pool is NaN."""

    spans: list[Span]
    kv_of_head: tuple[int, ...] = (0, 0, 0, 1, 1)
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    cache: LayerCache = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        kv_heads = self.kv_of_head[-1] + 1
        lengths = [-(-context // self.block_size) for _, context in self.spans]
        total = sum(lengths) + 2
        self.cache = allocate_cache(total, kv_heads, self.block_size, self.head_dim, self.dtype)
        order = torch.randperm(total, generator=generator)
        self.tables = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in enumerate(lengths):
            self.tables[row, :length], order = order[:length], order[length:]
        for pool in (self.cache.keys, self.cache.values):
            pool.copy_(torch.randn(pool.shape, generator=generator))
            pool[order] = math.nan
        self.rows = sum(rows for rows, _ in self.spans)
        width = len(self.kv_of_head) * self.head_dim
        self.q = torch.randn(self.rows, width, generator=generator)
        self.pattern = Pattern(self.kv_of_head, 2 * self.head_dim**-0.5, self.window)

    def forget(self, position: int) -> None:
        """The blocks of every sequence that end before a position may hold anything."""
        gone = self.tables[:, : position // self.block_size].flatten()
        self.cache.keys[gone] = math.nan
        self.cache.values[gone] = math.nan

    def run(self, spans: list[tuple[int, int, int, int]], threads: int = 1, **extras: object):
        out = torch.full_like(self.q, math.nan)
        spans_S4 = torch.tensor(spans)
        scratch = AttentionScratch(self.head_dim, threads)
        program = attention(
            self.q, out, self.cache, self.pattern, spans_S4, self.tables, scratch, **extras
        )
        launch(program, threads, rows=self.rows, spans=len(spans), table=self.tables.shape[1])
        return out

    def at_once(self, threads: int = 1, **extras: object) -> torch.Tensor:
        return self.run(self._spans(), threads, **extras)

    def row_by_row(self) -> torch.Tensor:
        """Every row as the decode step that would have computed it."""
        decodes = []
        for first, rows, context, table in self._spans():
            start = context - rows + 1
            decodes += [(first + i, 1, start + i, table) for i in range(rows)]
        return self.run(decodes)

    def expected(
        self,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In float64."""
        out = torch.empty_like(self.q, dtype=torch.float64)
        for first, rows, context, table in self._spans():
            k_NCH, v_NCH = (
                pool[self.tables[table]]
                .double()
                .transpose(0, 1)
                .flatten(1, 2)[list(self.kv_of_head), :context]
                for pool in (self.cache.keys, self.cache.values)
            )
            q_TNH = self.q[first : first + rows].double().unflatten(1, (-1, self.head_dim))
            scores_NTC = q_TNH.transpose(0, 1) @ k_NCH.transpose(1, 2) * self.pattern.scale
            if softcap is not None:
                scores_NTC = softcap * torch.tanh(scores_NTC / softcap)
            distance_TC = torch.arange(context - rows, context)[:, None] - torch.arange(context)
            if slopes is not None:
                scores_NTC = scores_NTC - slopes.double()[:, None, None] * distance_TC
            unseen_TC = distance_TC < 0
            if self.window is not None:
                unseen_TC |= distance_TC >= self.window
            scores_NTC = scores_NTC.masked_fill(unseen_TC, -math.inf)
            if sinks is not None:
                sink_NT1 = sinks.double()[:, None, None].expand(-1, rows, 1)
                scores_NTC = torch.cat((scores_NTC, sink_NT1), -1)
            weights_NTC = scores_NTC.softmax(-1)[..., :context]
            answer_NTH = weights_NTC @ v_NCH.masked_fill(v_NCH.isnan(), 0)
            out[first : first + rows] = answer_NTH.transpose(0, 1).flatten(1)
        return out

    def _spans(self) -> list[tuple[int, int, int, int]]:
        found, first = [], 0
        for table, (rows, context) in enumerate(self.spans):
            found.append((first, rows, context, table))
            first += rows
        return found


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 sums of a few hundred products of unit scale: errors of some 1e-7, times 10."""
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-6)


MIXED: list[Span] = [(20, 20), (1, 150), (70, 200), (1, 1), (1, 64), (1, 65)]
SHAPES = {
    "a group cut short": {},
    "nine over three": {"kv_of_head": (0, 0, 0, 1, 1, 1, 2, 2, 2)},
    "one head": {"kv_of_head": (0,)},
    "more rows to a position than a block has": {"kv_of_head": (0,) * 50, "head_dim": 16},
    "head of 80": {"head_dim": 80, "kv_of_head": (0, 1)},
    "head of 96": {"head_dim": 96, "kv_of_head": (0, 0)},
    "head of 20": {"head_dim": 20},
    "head of 8": {"head_dim": 8},
    "blocks of 8": {"block_size": 8},
    "blocks of 5": {"block_size": 5},
    "blocks of 128": {"block_size": 128},
    "window": {"window": 50},
    "window of one": {"window": 1},
    "window in blocks of 8": {"window": 70, "block_size": 8, "head_dim": 20},
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_softmax_of_scores_times_values(shape: dict, threads: int) -> None:
    step = Step(MIXED, **shape)
    close(step.at_once(threads), step.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [{}, {"head_dim": 20, "block_size": 5, "window": 50}])
def test_a_cache_of_16_bits_is_read_exactly(dtype: torch.dtype, shape: dict) -> None:
    step = Step(MIXED, dtype=dtype, **shape)
    close(step.at_once(), step.expected())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_has_the_same_bits_in_a_chunk_and_in_a_decode_step(shape: dict) -> None:
    step = Step(MIXED, **shape)
    whole = step.at_once()
    assert torch.equal(whole.view(torch.int32), step.row_by_row().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_it_has_with_a_cache_of_16_bits(dtype: torch.dtype) -> None:
    step = Step(MIXED, dtype=dtype)
    assert torch.equal(step.at_once(), step.row_by_row())


def test_chunks_and_threads_leave_the_bits_alone() -> None:
    step = Step([(150, 200)])
    whole = step.at_once()
    assert torch.equal(whole, step.at_once(threads=3))
    chunks = [(0, 49, 99, 0), (49, 1, 100, 0), (50, 100, 200, 0)]
    assert torch.equal(whole, step.run(chunks, threads=2))


@pytest.mark.parametrize("block_size", [5, 16, 128])
def test_blocks_before_the_window_are_not_read(block_size: int) -> None:
    step = Step([(1, 300), (30, 330)], window=70, block_size=block_size)
    before = step.at_once()
    step.forget(300 - 70)
    assert torch.equal(step.at_once(), before)


def test_what_lies_behind_the_context_weighs_nothing() -> None:
    step = Step([(3, 37)])
    before = step.at_once()
    last = step.tables[0, 37 // 16]
    step.cache.keys[last, :, 37 % 16 :] = math.nan
    step.cache.values[last, :, 37 % 16 :] = 3e38
    assert torch.equal(step.at_once(), before)


@pytest.mark.parametrize(
    "extras",
    [
        {"softcap": 1.5},
        {"sinks": torch.tensor([0.0, 3.0, -2.0, 40.0, 1.0])},
        {"slopes": torch.tensor([0.5, 0.25, 0.01, 0.0, 1.0])},
    ],
    ids=["softcap", "sinks", "slopes"],
)
@pytest.mark.parametrize("window", [None, 50])
def test_logits_may_be_capped_sunk_and_sloped(extras: dict, window: int | None) -> None:
    step = Step(MIXED, window=window)
    close(step.at_once(**extras), step.expected(**extras))


def test_far_logits_neither_overflow_nor_vanish() -> None:
    step = Step([(40, 200)])
    step.q *= 300  # logits of some thousands: softmax picks one position
    expected = step.expected()
    torch.testing.assert_close(step.at_once().double(), expected, rtol=0, atol=2e-3)


def test_a_row_that_is_no_number_stays_alone() -> None:
    step = Step(MIXED)
    good = step.at_once()
    step.q[25] = math.nan
    bad = step.at_once()
    assert bad[25].isnan().all()
    bad[25] = good[25]
    assert torch.equal(bad, good)


def test_queries_may_be_columns_of_a_wider_buffer() -> None:
    step = Step(MIXED)
    expected = step.at_once()
    wide = torch.full((step.rows, step.q.shape[1] + 128), math.nan)
    wide[:, : step.q.shape[1]] = step.q
    step.q = wide[:, : step.q.shape[1]]
    assert torch.equal(step.at_once(), expected)


def test_faults_are_named() -> None:
    step = Step([(1, 20)])
    spans, scratch = torch.zeros(1, 4, dtype=torch.int64), AttentionScratch(64, 1)

    def record(**changed: object) -> None:
        arguments = {
            "q": step.q,
            "out": torch.empty_like(step.q),
            "cache": step.cache,
            "pattern": step.pattern,
            "spans": spans,
            "tables": step.tables,
            "scratch": scratch,
        }
        attention(**(arguments | changed))

    record()
    with pytest.raises(ValueError, match=r"q: torch.float32 of shape \(1, 64\).*5 heads x 64"):
        record(q=step.q[:, :64])
    with pytest.raises(ValueError, match=r"out: torch.float64"):
        record(out=step.q.double())
    with pytest.raises(ValueError, match=r"spans: torch.int32"):
        record(spans=spans.int())
    with pytest.raises(ValueError, match=r"scratch for 32 channels.*the cache has 64"):
        record(scratch=AttentionScratch(32, 1))
    with pytest.raises(ValueError, match=r"a cache of 2 KV heads"):
        record(pattern=Pattern((0,) * 5, 1.0))
    plain = LayerCache(torch.zeros(4, 2, 16, 64), torch.zeros(4, 2, 16, 64))
    with pytest.raises(ValueError, match="allocate it with `allocate_cache`"):
        record(cache=plain)
    with pytest.raises(ValueError, match=r"KV cache of torch.float64"):
        allocate_cache(4, 2, 16, 64, torch.float64)
