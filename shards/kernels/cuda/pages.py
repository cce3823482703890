"""Block tables as FlashInfer takes them: one list of pages for all sequences (CSR)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.batch import Batch

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pages:
    """Of S sequences, in the batch's order; int32.

    Sequence s has the rows `row_starts[s] .. row_starts[s + 1]` and the pages
    `indices[starts[s] .. starts[s + 1]]`, of whose last `last_lengths[s]` places are in use, from 1
    to the page size. (FlashInfer: qo_indptr, paged_kv_indptr, paged_kv_indices,
    paged_kv_last_page_len.)
    """

    row_starts: Int32
    starts: Int32
    indices: Int32
    last_lengths: Int32


def pages_of(batch: Batch, page_size: int) -> Pages:
    """The pages of a batch's sequences; a KV block is a page."""
    counts, contexts, tables = batch.spans_S4[:, 1], batch.spans_S4[:, 2], batch.spans_S4[:, 3]
    pages = -(-contexts // page_size)
    used = np.arange(pages.max()) < pages[:, None]
    return Pages(
        starts_of(counts),
        starts_of(pages),
        batch.tables[tables, : pages.max()][used].astype(np.int32),
        (contexts - (pages - 1) * page_size).astype(np.int32),
    )


def starts_of(lengths: npt.NDArray[np.int64]) -> Int32:
    """[S] -> int32 [S + 1]: where each of so many things begins, and the end."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
