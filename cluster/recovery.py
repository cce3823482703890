"""How often a group may be rebuilt, and a request be computed again. Pure logic."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0
"""What happened before that does not count any more."""

# Of one request: losses in a row that it was computed in without a token in between, and losses in
# all. Two, since the first may be chance; more where it gets on, since others may be at fault.
_MOST_FRUITLESS = 2
_MOST_LOSSES = 3


class Recoveries:
    """At most `most` of them within `WINDOW_S`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether there may be another one, which it then counts; `now` in seconds."""
        _forget(self._taken, now)
        if len(self._taken) >= self._most:
            return False
        self._taken.append(now)
        return True


class Suspicion:
    """How likely a request is what takes ranks with it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque()
        self._fruitless = 0

    def clear(self) -> None:
        """The request got a token."""
        self._fruitless = 0

    def confirm(self, now: float) -> bool:
        """A step of the request was lost with a rank; whether that is once too often."""
        _forget(self._losses, now)
        self._losses.append(now)
        self._fruitless += 1
        return self._fruitless >= _MOST_FRUITLESS or len(self._losses) >= _MOST_LOSSES


def _forget(times: deque[float], now: float) -> None:
    while times and times[0] <= now - WINDOW_S:
        times.popleft()
