"""Where a step's time goes, phase by phase."""

from __future__ import annotations

import time
from typing import Final, Literal, get_args

from shards.contract import PhaseSeconds

Phase = Literal["embed", "attention", "ffn", "all_reduce", "output", "sample"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)


class PhaseTimer:
    """Splits a step into phases: `mark(p)` says that the time since the last mark went into p.

    Host time: on CUDA it is the time to launch, not to compute.
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._seconds: dict[Phase, float] = {}

    def mark(self, phase: Phase) -> None:
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def credit(self, phase: Phase, seconds: float) -> None:
        """Say that so much of the time since the last mark went into `phase`."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._last += seconds

    def seconds(self) -> PhaseSeconds:
        return PhaseSeconds(**self._seconds, total=self._last - self._start)


def add(a: PhaseSeconds, b: PhaseSeconds) -> PhaseSeconds:
    """The sums of two steps' phases."""
    return PhaseSeconds(
        *(getattr(a, name) + getattr(b, name) for name in PhaseSeconds.__struct_fields__)
    )
