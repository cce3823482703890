"""What can happen to a rank in the middle of a stream."""

from __future__ import annotations

import os
import signal

import pytest

from cluster import Engine, Unavailable
from cluster.request import HealthState, Request, SamplingParams, Stopping


def kill_rank_1_in_mid_stream(engine: Engine) -> None:
    """SIGKILL, where no rank is replaced; every party must say which one it was."""
    request = Request("doomed", (1,), SamplingParams(temperature=0.0), Stopping(max_tokens=250))
    events = iter(engine.driver.submit(request))
    next(events)
    os.kill(engine.driver.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match=r"rank 1 \(pid \d+, .*\) died"):
        list(events)
    health = engine.driver.health()
    assert health.state is HealthState.NOT_READY
    assert "rank 1" in health.ranks[0].cause
