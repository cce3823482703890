"""The numbers of rows that decode steps are captured with."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Beyond this a step computes for longer than its launches take, and runs without a graph.
MOST = 512
# Up to here the next rung is at most 8 rows away, above it 16.
_FINE = 256


def ladder(sequences: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24.. up to `sequences`, or to `MOST`; rising."""
    top = min(sequences, MOST)
    rungs = {1, 2, 4, *range(8, _FINE + 1, 8), *range(_FINE, MOST + 1, 16), top}
    return tuple(sorted(rung for rung in rungs if rung <= top))


def rung(rungs: Sequence[int], rows: int) -> int | None:
    """The least of the rising `rungs` that holds so many rows; None above the highest."""
    at = bisect_left(rungs, rows)
    return rungs[at] if at < len(rungs) else None
