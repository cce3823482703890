"""Tokens a second, out of a counter that only grows."""

from __future__ import annotations

import time
from collections.abc import Callable

_WINDOW_SECONDS = 1.0


class Throughput:
    """Rates between readings, each over a second at least, however often there are readings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._readings: dict[str, tuple[float, int, float]] = {}  # when, count, rate before it

    def of(self, name: str, count: int) -> float:
        """What `name` counted per second lately; 0 at its first reading."""
        now = self._clock()
        since, before, rate = self._readings.setdefault(name, (now, count, 0.0))
        if now - since >= _WINDOW_SECONDS:
            # A counter that starts anew has lost what it knew.
            rate = max(0, count - before) / (now - since)
            self._readings[name] = (now, count, rate)
        return rate
