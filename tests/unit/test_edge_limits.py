"""How much a caller may ask for: at a time, a minute, and how urgently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.errors import NoToken, Overloaded, StartupError
from cluster.request import BeamParams, Request, Stopping
from cluster.text import TextDelta
from deploy.edge.answers import Caller, Watch
from deploy.edge.errors import DeadlineExceeded, Forbidden, LimitExceeded
from deploy.edge.limits import CallerLimits, read_limits
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import running_edge
from tests.unit.http_server import running_api

ALICE, BOB = Caller("grpc", "alice"), Caller("http", "bob")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Limited:
    """Limits as a file has them, at a time of our own."""

    def __init__(self, path: Path, content: str) -> None:
        self.path = path
        self.clock = Clock()
        path.write_text(content)
        self._limits = CallerLimits(str(path), clock=self.clock, check_every_s=0)

    def begin(
        self, caller: Caller = ALICE, *, prompt: int = 1, max_tokens: int | None = 1, **fields: Any
    ) -> Watch:
        stopping = Stopping(max_tokens=max_tokens)
        request = Request("r", prompt=(0,) * prompt, stopping=stopping, **fields)
        return self._limits.begin("m", request, caller)

    def room(self, caller: Caller) -> int | None:
        return self._limits.room(caller)

    def refused(self, *args: Any, **fields: Any) -> LimitExceeded:
        with pytest.raises(LimitExceeded) as caught:
            self.begin(*args, **fields)
        return caught.value


@pytest.fixture
def limited(tmp_path: Path) -> Callable[[str], Limited]:
    return lambda content: Limited(tmp_path / "limits.yaml", content)


def tokens(count: int) -> TextDelta:
    return TextDelta(0, "", (0,) * count)


def test_requests_at_a_time(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {concurrent_requests: 2}")
    first, _ = limits.begin(), limits.begin()
    error = limits.refused()
    assert (error.caller, error.metric, error.limit) == ("alice", "concurrent_requests", 2)
    assert error.retry_after > 0
    limits.begin(BOB)
    first.end(None)
    limits.begin()
    limits.refused()


def test_requests_a_minute(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {requests_per_minute: 3}")
    for _ in range(3):
        limits.begin().end(None)
    assert limits.refused().retry_after == pytest.approx(20)
    limits.clock.now += 19.9
    limits.refused()
    limits.clock.now += 0.1
    limits.begin().end(None)
    limits.refused()


def test_tokens_are_reserved_and_settled(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    watch = limits.begin(prompt=100, max_tokens=400)
    assert limits.refused(prompt=1, max_tokens=100).retry_after == pytest.approx(0.1)
    watch.delta(tokens(20))
    watch.end(None)  # 120 used
    limits.begin(prompt=80, max_tokens=400)
    limits.refused()


def test_every_sample_counts(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    limits.begin(prompt=100, max_tokens=100, n=4)
    limits.refused(prompt=50, max_tokens=51)
    limits.begin(prompt=50, max_tokens=50)


def test_what_goes_beyond_the_reservation_is_owed(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    watch = limits.begin(prompt=500, max_tokens=5000)
    watch.delta(tokens(700))
    watch.end(None)  # 1200 used
    error = limits.refused(prompt=500, max_tokens=5000)
    assert error.retry_after == pytest.approx(120)
    limits.clock.now += 120
    limits.begin(prompt=500, max_tokens=5000)


def test_an_unstated_length_does_not_reserve_the_context(
    limited: Callable[[str], Limited],
) -> None:
    limits = limited("default: {tokens_per_minute: 10000}")
    for _ in range(9):
        limits.begin(prompt=10, max_tokens=None)
    limits.refused(prompt=10, max_tokens=None)


def test_a_request_that_the_server_refuses_costs_no_tokens(
    limited: Callable[[str], Limited],
) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    limits.begin(prompt=600).end(Overloaded("full", 1.0))
    limits.begin(prompt=600).end(asyncio.CancelledError())
    limits.refused(prompt=10)


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), NoToken("no token is allowed")])
def test_a_prompt_that_was_computed_costs_its_tokens(
    limited: Callable[[str], Limited], error: Exception
) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    limits.begin(prompt=600).end(error)
    limits.refused(prompt=10)


def test_every_beam_counts(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {tokens_per_minute: 600}")
    limits.begin(prompt=100, max_tokens=100, beams=BeamParams(4))
    limits.refused(prompt=50, max_tokens=51)


def test_callers_whose_requests_run_are_not_forgotten(
    limited: Callable[[str], Limited], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.edge.limits._MOST_CALLERS", 2)
    limits = limited("default: {concurrent_requests: 1, requests_per_minute: 2}")
    limits.begin()
    strangers = [Caller("grpc", address=f"10.0.0.{number}") for number in range(3)]
    for stranger in strangers:
        limits.begin(stranger).end(None)
    assert limits.refused().metric == "concurrent_requests"
    # Of those who came and went, the first one has been forgotten and the last one has not.
    limits.begin(strangers[2]).end(None)
    assert limits.refused(strangers[2]).metric == "requests_per_minute"


def test_room(limited: Callable[[str], Limited]) -> None:
    limits = limited(
        "default: {concurrent_requests: 2}\ncallers: {bob: {concurrent_requests: null}}"
    )
    running = limits.begin()
    assert (limits.room(ALICE), limits.room(BOB)) == (1, None)
    running.end(None)
    assert limits.room(ALICE) == 2


async def test_more_prompts_of_one_call_than_may_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "limits"
    path.write_text("default: {concurrent_requests: 2}")
    async with running_api(limiter=CallerLimits(str(path))) as api:
        answer = await api.complete(prompt=["x"] * 9, max_tokens=1)
    assert len(answer["choices"]) == 9


def test_a_callers_own_entry_wins_field_by_field(limited: Callable[[str], Limited]) -> None:
    limits = limited(
        "default: {concurrent_requests: 1, requests_per_minute: 2}\n"
        "callers: {alice: {concurrent_requests: null}}"
    )
    limits.begin()
    limits.begin()
    assert limits.refused().metric == "requests_per_minute"
    limits.begin(BOB)
    assert limits.refused(BOB).metric == "concurrent_requests"


def test_priority(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {max_priority: 0}\ncallers: {alice: {max_priority: 5}}")
    limits.begin(priority=5)
    limits.begin(BOB, priority=-3)
    for caller, priority in ((ALICE, 6), (BOB, 1)):
        with pytest.raises(Forbidden, match=f"priority {priority}: {caller.name} may ask"):
            limits.begin(caller, priority=priority)


def test_strangers_share_their_address(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {concurrent_requests: 1}")
    for address in ("10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8:0:1::1", ""):
        limits.begin(Caller("grpc", address=address))
    for address in ("10.0.0.1", "::ffff:10.0.0.1", "2001:db8::2", "2001:db8:0:1:2::", ""):
        limits.refused(Caller("http", address=address))


def test_limits_are_read_again(limited: Callable[[str], Limited]) -> None:
    limits = limited("default: {concurrent_requests: 1}")
    limits.begin()
    limits.refused()
    limits.path.write_text("default: {concurrent_requests: 20}")
    limits.begin()
    limits.path.write_text("default: {concurrent_requests: none at all}")
    limits.begin()
    limits.path.write_text("since: 2024-13-45")
    limits.begin()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("default: {requests_per_hour: 1}", "default.requests_per_hour"),
        ("callers: {bob: {tokens_per_minute: 0}}", "callers.bob.tokens_per_minute"),
        ("default: {concurrent_requests: yes}", "default.concurrent_requests"),
        ("default: {max_priority: no}", "default.max_priority"),
        ("- 1", "limits_file"),
        ("{", "not YAML"),
        ("\x00", "not YAML"),
        ("since: 2024-13-45", "not YAML: month"),
        ("[" * 5000, "not YAML"),
        ("#" * (1 << 20) + "\n", "more than 1 MiB"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(content)
    with pytest.raises(StartupError, match=fault):
        read_limits(str(path))


async def test_a_refusal_says_which_limit_and_when_to_come_back(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("alice:secret")
    (tmp_path / "limits").write_text("default: {requests_per_minute: 1}")
    async with running_edge(
        token_file=str(tmp_path / "tokens"), limits_file=str(tmp_path / "limits")
    ) as edge:
        request = pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=1))
        metadata = (("authorization", "Bearer secret"),)
        assert await edge.inference.Generate(request, metadata=metadata).read()
        call = edge.inference.Generate(request, metadata=metadata)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(await call.trailing_metadata())
        status = rpc_status.status_pb2.Status.FromString(trailers["grpc-status-details-bin"])

    info, retry, quota = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.QuotaFailure(),
    )
    for packed, detail in zip(status.details, (info, retry, quota), strict=False):
        assert packed.Unpack(detail)
    assert (info.reason, info.domain) == ("LIMIT_EXCEEDED", "headwise")
    expected = {"limit": "requests_per_minute", "value": "1", "caller": "alice"}
    assert dict(info.metadata) == expected
    assert 55 < retry.retry_delay.seconds <= 60
    (violation,) = quota.violations
    assert (violation.subject, violation.quota_value) == ("caller:alice", 1)
    assert violation.quota_metric == "requests_per_minute"
