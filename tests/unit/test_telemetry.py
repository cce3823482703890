"""What goes into the log, and what does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog

from deploy.telemetry import LOG_FILE, configure_logging


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The log file of a process that is set up as a server's."""
    before = structlog.get_config()
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setenv(LOG_FILE, str(tmp_path / "log"))
    configure_logging("json")
    yield tmp_path / "log"
    structlog.configure(**before)


def entries(log: Path) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in log.read_text().splitlines()]
    return [(entry["level"], entry["event"]) for entry in found]


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
