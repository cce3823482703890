"""When to try again, and how long to wait first. Shared by both clients; never sleeps itself."""

from __future__ import annotations

import math
import random
import time

from headwise.errors import DeadlineExceededError, HeadwiseError, OverloadedError, UnavailableError
from headwise.options import RetryPolicy
from headwise.types import Health, HealthState


def check_timeout(timeout: float | None) -> None:
    """Raises ValueError for 0 seconds or less; None and infinity are no limit."""
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds or None, not {timeout}")


class Deadline:
    """A point in time, or none at all."""

    def __init__(self, timeout: float | None) -> None:
        check_timeout(timeout)
        self._end = math.inf if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left, not below 0; None for no limit."""
        return None if self._end == math.inf else max(0.0, self._end - time.monotonic())


class Attempts:
    """The attempts at one call: `pause` after each failed one, `progressed` when something came."""

    def __init__(self, policy: RetryPolicy, deadline: Deadline) -> None:
        self.policy = policy
        self._deadline = deadline
        self._failed = 0
        self._begun = False
        self._broke_at = 0.0

    def remaining(self) -> float | None:
        """The timeout of the next attempt, in seconds."""
        return self._deadline.remaining()

    def progressed(self) -> None:
        """The attempts begin anew; from here on `resume_timeout` bounds them."""
        self._begun = True
        self._failed = 0

    def pause(self, error: HeadwiseError, *, temporary: bool = False) -> float | None:
        """Seconds to wait before the next attempt; None if there is none and `error` stands.

        `temporary` is an error that another attempt may not meet, whatever its class says.
        """
        self._failed += 1
        if self._failed == 1:
            self._broke_at = time.monotonic()
        if isinstance(error, OverloadedError):
            # Without a hint it is not the server's queue that is full, and may stay so.
            asked = error.retry_after
            if asked is None or asked > self.policy.max_retry_after:
                return None
        elif isinstance(error, UnavailableError) or temporary:
            asked = 0.0
        else:
            return None
        pause = asked + _backoff(self._failed, self.policy)
        if not self._may_fail_again_after(pause):
            return None
        left = self._deadline.remaining()
        return pause if left is None or pause < left else None

    def _may_fail_again_after(self, pause: float) -> bool:
        if self._begun:
            return time.monotonic() + pause - self._broke_at <= self.policy.resume_timeout
        return self._failed < self.policy.attempts


class Readiness:
    """Polls of a server's health until it computes: `pause` after each one that said no."""

    _POLLS = RetryPolicy(initial_backoff=0.1, max_backoff=1.0)
    _POLL_TIMEOUT = 5.0

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._deadline = Deadline(timeout)
        self._polls = 0
        self._cause = "it does not answer"

    def poll_timeout(self) -> float:
        """The timeout of the next poll, in seconds; raises DeadlineExceededError if time is up."""
        left = self._deadline.remaining()
        if left is None:
            return self._POLL_TIMEOUT
        if left == 0:
            raise DeadlineExceededError(f"not ready after {self._timeout:g} s: {self._cause}")
        return min(left, self._POLL_TIMEOUT)

    def accepts(self, health: Health) -> bool:
        """Whether the server computes."""
        self._cause = f"{health.state}: {health.cause}" if health.cause else str(health.state)
        return health.state in (HealthState.READY, HealthState.DEGRADED)

    def failed(self, error: HeadwiseError) -> None:
        """Take note of a poll that failed; raises `error` if waiting will not mend it."""
        if not isinstance(error, UnavailableError | OverloadedError | DeadlineExceededError):
            raise error
        # The last poll is cut short by the deadline, which is no cause: keep the one before.
        if not isinstance(error, DeadlineExceededError):
            self._cause = str(error)

    def pause(self) -> float:
        """Seconds to wait before the next poll."""
        self._polls += 1
        left = self._deadline.remaining()
        pause = _backoff(self._polls, self._POLLS)
        return pause if left is None else min(pause, left)


def _backoff(failed: int, policy: RetryPolicy) -> float:
    # The exponent is bounded because waiting for readiness may take any number of polls.
    whole: float = min(policy.max_backoff, policy.initial_backoff * 2 ** min(failed - 1, 32))
    return whole * random.uniform(0.5, 1.0)
