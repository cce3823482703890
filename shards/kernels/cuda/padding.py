"""Decode steps filled up to a rung of the ladder."""

from __future__ import annotations

import numpy as np

from shards.batch import Batch, Int64


def is_decode(batch: Batch) -> bool:
    """Every sequence has one row."""
    return bool((batch.spans_S4[:, 1] == 1).all())


def padded(batch: Batch, rows: int, width: int, block_size: int, scratch: int) -> Batch:
    """A decode step of `rows` sequences, whose tables are [rows, width].

    Those beyond the batch's are one token long, in block `scratch`, which no sequence owns: they
    may all write the same place, and nobody reads it. It also stands in for the blocks that a
    table does not have.
    """
    spans = batch.spans_S4
    sequences = len(spans)
    given = batch.tables[spans[:, 3], :width]
    used = np.arange(given.shape[1]) < -(-spans[:, 2:3] // block_size)
    tables = np.full((rows, width), scratch, np.int64)
    tables[:sequences, : given.shape[1]] = np.where(used, given, scratch)
    at = np.arange(rows)
    contexts = np.ones(rows, np.int64)
    contexts[:sequences] = spans[:, 2]
    return Batch(
        _filled(batch.tokens_T, rows, 0),
        _filled(batch.positions_T, rows, 0),
        _filled(batch.blocks_T, rows, scratch),
        _filled(batch.offsets_T, rows, 0),
        np.stack((at, np.ones_like(at), contexts, at), axis=1),
        tables,
    )


def scratch_decode(rows: int, width: int, block_size: int, scratch: int) -> Batch:
    """A decode step of padding alone."""
    nothing = np.empty(0, np.int64)
    spans, tables = np.empty((0, 4), np.int64), np.empty((0, width), np.int64)
    batch = Batch(nothing, nothing, nothing, nothing, spans, tables)
    return padded(batch, rows, width, block_size, scratch)


def scratch_prefill(rows: int, scratch: int) -> Batch:
    """The first `rows` positions of a sequence within block `scratch`."""
    at = np.arange(rows)
    spans = np.array([[0, rows, rows, 0]])
    return Batch(np.zeros_like(at), at, np.full_like(at, scratch), at, spans, np.array([[scratch]]))


def _filled(values: Int64, rows: int, padding: int) -> Int64:
    return np.concatenate((values, np.full(rows - len(values), padding, np.int64)))
