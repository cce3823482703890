"""Steps as graphs and FlashInfer take them: rungs, padding, page lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.batch import Batch
from shards.kernels.cuda.ladder import MOST, ladder, rung
from shards.kernels.cuda.padding import is_decode, padded, scratch_decode, scratch_prefill
from shards.kernels.cuda.pages import pages_of

BLOCK, SCRATCH = 8, 99


def decodes(contexts: list[int], width: int = 4) -> Batch:
    """A decode of one sequence per context; table row s holds blocks 10 s, 10 s + 1 .."""
    last = np.array(contexts, np.int64) - 1
    at = np.arange(len(contexts))
    tables = 10 * at[:, None] + np.arange(width)
    return Batch(
        at + 1,
        last,
        tables[at, last // BLOCK],
        last % BLOCK,
        np.stack((at, np.ones_like(at), last + 1, at), axis=1),
        tables,
    )


def test_the_ladder_is_fine_where_steps_are_small() -> None:
    assert ladder(24) == (1, 2, 4, 8, 16, 24)
    assert ladder(1) == (1,)
    assert ladder(3) == (1, 2, 3)
    assert ladder(300)[-4:] == (256, 272, 288, 300)
    assert ladder(4096)[-1] == MOST


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_rung_is_the_least_that_holds_a_step(sequences: int, rows: int) -> None:
    rungs = ladder(sequences)
    found = rung(rungs, rows)
    if found is None:
        assert rows > min(sequences, MOST)
    else:
        assert rows <= found
        assert all(lower < rows for lower in rungs if lower < found)
        assert found - rows < 16


def test_padding_rows_touch_the_scratch_block_alone() -> None:
    batch = padded(decodes([9, 17]), 4, 4, BLOCK, SCRATCH)
    assert is_decode(batch)
    assert batch.tokens_T.tolist() == [1, 2, 0, 0]
    assert batch.blocks_T.tolist() == [1, 12, SCRATCH, SCRATCH]
    assert batch.offsets_T.tolist() == [0, 0, 0, 0]
    assert batch.spans_S4.tolist() == [[0, 1, 9, 0], [1, 1, 17, 1], [2, 1, 1, 2], [3, 1, 1, 3]]
    assert batch.tables.tolist() == [
        [0, 1, SCRATCH, SCRATCH],
        [10, 11, 12, SCRATCH],
        [SCRATCH] * 4,
        [SCRATCH] * 4,
    ]


def test_padding_reads_only_table_rows_that_a_span_names() -> None:
    """Rows of other sequences, and blocks that a context does not fill, may hold anything."""
    batch = decodes([9, 17])
    tables = np.full((7, 9), -1)
    tables[5, :2], tables[3, :3] = batch.tables[0, :2], batch.tables[1, :3]
    spans = batch.spans_S4.copy()
    spans[:, 3] = 5, 3
    moved = Batch(batch.tokens_T, batch.positions_T, batch.blocks_T, batch.offsets_T, spans, tables)
    expected = padded(batch, 3, 4, BLOCK, SCRATCH).tables
    assert np.array_equal(padded(moved, 3, 4, BLOCK, SCRATCH).tables, expected)


def test_steps_on_scratch_alone() -> None:
    batch = scratch_decode(3, 4, BLOCK, SCRATCH)
    assert set(batch.blocks_T) == set(batch.tables.ravel()) == {SCRATCH}
    prompt = scratch_prefill(BLOCK, SCRATCH)
    assert not is_decode(prompt)
    assert prompt.spans_S4.tolist() == [[0, BLOCK, BLOCK, 0]]
    assert set(prompt.blocks_T) == set(prompt.tables.ravel()) == {SCRATCH}
    assert prompt.offsets_T.tolist() == list(range(BLOCK))


def test_pages_of_chunks_and_decodes() -> None:
    batch = decodes([1, 8, 9, 24])
    spans = batch.spans_S4.copy()
    spans[:, 0], spans[:, 1] = [0, 1, 5, 6], [1, 4, 1, 7]
    pages = pages_of(
        Batch(
            batch.tokens_T, batch.positions_T, batch.blocks_T, batch.offsets_T, spans, batch.tables
        ),
        BLOCK,
    )
    assert pages.row_starts.tolist() == [0, 1, 5, 6, 13]
    assert pages.starts.tolist() == [0, 1, 2, 4, 7]
    assert pages.indices.tolist() == [0, 10, 20, 21, 30, 31, 32]
    assert pages.last_lengths.tolist() == [1, 8, 1, 8]
    arrays = (pages.row_starts, pages.starts, pages.indices, pages.last_lengths)
    assert all(array.dtype == np.int32 for array in arrays)


@given(st.lists(st.integers(1, 4 * BLOCK), min_size=1, max_size=6))
def test_pages_hold_every_position_once(contexts: list[int]) -> None:
    pages = pages_of(decodes(contexts), BLOCK)
    for s, context in enumerate(contexts):
        used = pages.indices[pages.starts[s] : pages.starts[s + 1]]
        assert (len(used) - 1) * BLOCK + pages.last_lengths[s] == context
        assert used.tolist() == [10 * s + i for i in range(-(-context // BLOCK))]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_padded_decode_is_as_wide_as_was_asked(rows: int) -> None:
    assert padded(decodes([3]), rows, 2, BLOCK, SCRATCH).tables.shape == (rows, 2)
