"""What goes into the log, and what does not."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from cluster.errors import Overloaded
from deploy.edge.answers import Caller
from deploy.telemetry.logs import LOG_FILE, configure_logging
from deploy.telemetry.request_log import RequestLog, trace_id
from tests.unit.fakes import FakeGenerator
from tests.unit.watched import answer, request


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The log file of a process that is set up as a server's."""
    before = structlog.get_config()
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setenv(LOG_FILE, str(tmp_path / "log"))
    configure_logging("json")
    yield tmp_path / "log"
    structlog.configure(**before)


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def entries(log: Path) -> list[tuple[str, str]]:
    return [(entry["level"], entry["event"]) for entry in lines(log)]


def test_our_own_events_and_what_libraries_warn_of(log: Path) -> None:
    structlog.get_logger().info("call")
    logging.getLogger("library").info("not this")
    logging.getLogger("library").warning("beware")

    assert entries(log) == [("info", "call"), ("warning", "beware")]


def test_a_client_that_went_away_is_no_error(log: Path) -> None:
    class ExecuteBatchError(grpc.aio.InternalError):
        """gRPC's own is private."""

    grpc_log = logging.getLogger("grpc._cython.cygrpc")
    grpc_log.error("raised in core", exc_info=ExecuteBatchError("Failed"))
    grpc_log.error("raised in core", exc_info=grpc.aio.UsageError("a mistake of ours"))

    assert entries(log) == [("error", "raised in core")]
    assert "a mistake of ours" in log.read_text()


TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_a_request_has_one_line_and_its_ids_are_on_every_other(log: Path) -> None:
    async def call() -> None:
        caller = Caller("grpc", "batch", f"00-{TRACE}-b7ad6b7169203331-01")
        asked = request("id-1", prompt=8, max_tokens=4)
        deltas = await answer(FakeGenerator(), [RequestLog()], asked, caller)
        structlog.get_logger().info("something about it", text_length=len(deltas[0].text))

    await asyncio.create_task(call())

    line, other = lines(log)
    assert line["event"] == "request"
    assert line["prompt_tokens"] == 8
    assert line["generated_tokens"] == 4
    assert line["finish"] == ["length"]
    assert line["code"] == "OK"
    assert line["caller"] == "batch"
    assert line["queue_s"] == 0.25
    for entry in (line, other):
        assert (entry["request_id"], entry["trace_id"]) == ("id-1", TRACE)


async def test_a_request_that_fails_says_why_by_its_code(log: Path) -> None:
    generator = FakeGenerator()
    generator.refusal = Overloaded("full", retry_after=1.0)
    with pytest.raises(Overloaded):
        await answer(generator, [RequestLog()], request("id-1"))

    (line,) = lines(log)
    assert (line["code"], line["generated_tokens"]) == ("RESOURCE_EXHAUSTED", 0)
    assert "trace_id" not in line


async def test_no_text_of_prompt_or_answer_is_logged(log: Path) -> None:
    """The fake answers "abcd..."; prompts here are upper-case."""
    configure_logging("json", "DEBUG")
    secret = tuple(b"SECRET PROMPT")
    await answer(FakeGenerator(), [RequestLog()], request("1", prompt=1, max_tokens=8))
    await answer(FakeGenerator(), [RequestLog()], replace(request("2"), prompt=secret))

    written = json.dumps(lines(log))
    assert "SECRET" not in written
    assert str(list(secret))[1:20] not in written
    assert "abcd" not in written


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-01-more", TRACE),
        (f"ff-{TRACE}-b7ad6b7169203331-01", ""),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", ""),
        ("", ""),
    ],
)
def test_trace_ids_are_those_of_w3c(traceparent: str, expected: str) -> None:
    assert trace_id(traceparent) == expected


def test_the_level_is_kept(log: Path) -> None:
    configure_logging("json", "WARNING")
    structlog.get_logger().info("not this")
    structlog.get_logger().warning("this")
    assert entries(log) == [("warning", "this")]
