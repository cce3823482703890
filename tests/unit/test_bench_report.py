"""From records to a report: the arithmetic, by hand."""

from __future__ import annotations

from array import array
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from deploy.bench.record import INTERRUPTED, OK, Record
from deploy.bench.report import Report, distribution, in_flight, meets_objectives, summarize
from deploy.bench.run import Measured
from deploy.bench.settings import Settings
from deploy.bench.table import show
from headwise import Load, ServerInfo
from tests.unit.test_bench_load import MODEL

SERVER = ServerInfo(
    version="1",
    libraries={},
    tensor_parallel=2,
    device="cpu",
    collective="local",
    ranks=(),
    started_at=None,
    max_sequences=1,
    max_step_tokens=1,
    kv_blocks=1,
    block_size=1,
)


def load(steps: int, preemptions: int) -> Load:
    return Load(
        running=0,
        waiting=0,
        kv_blocks=1,
        kv_blocks_used=0,
        block_size=1,
        steps=steps,
        preemptions=preemptions,
        generated_tokens=0,
        prompt_tokens=0,
        cached_tokens=0,
    )


def record(
    index: int = 0,
    due: float = 0.0,
    sent: float = 0.0,
    ended: float = 2.0,
    arrivals: tuple[float, ...] = (1.0, 1.25, 2.0),
    tokens: tuple[int, ...] = (1, 1, 1),
    **fields: Any,
) -> Record:
    found = Record(index, due, sent, ended, **{"status": OK, "prompt_tokens": 10, **fields})
    for when, count in zip(arrivals, tokens, strict=True):
        found.arrived(when, count)
    return found


def report(*records: Record, interrupted: bool = False, **settings: Any) -> Report:
    chosen = Settings(**settings).completed()
    measured = Measured(MODEL, SERVER, list(records), 4.0, interrupted, load(5, 1), load(25, 4))
    return summarize("here:1", datetime(2026, 1, 2, tzinfo=UTC), chosen, measured)


def test_percentiles_of_known_values() -> None:
    found = distribution([*range(1, 101), None])

    assert found is not None
    assert (found.count, found.mean, found.max) == (100, 50.5, 100)
    # Between the two nearest: rank q * 99 counted from 0.
    assert found.p50 == pytest.approx(50.5)
    assert found.p90 == pytest.approx(90.1)
    assert found.p95 == pytest.approx(95.05)
    assert found.p99 == pytest.approx(99.01)


def test_one_value_is_all_its_percentiles_and_none_are_nothing() -> None:
    one = distribution([3.0])

    assert one is not None
    assert (one.p50, one.p99, one.max, one.mean) == (3.0, 3.0, 3.0, 3.0)
    assert distribution([]) is None
    assert distribution([None]) is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = report(record(due=0.25, sent=0.75, arrivals=(1.0, 1.25, 2.0), ended=2.5), rate=1)

    assert late.latency_s.ttft is not None
    assert late.latency_s.ttft.mean == 0.75
    assert late.latency_s.e2e is not None
    assert late.latency_s.e2e.mean == 2.25
    assert late.send_lag_s is not None
    assert late.send_lag_s.max == 0.5


def test_a_closed_loop_has_no_send_lag() -> None:
    assert report(record()).send_lag_s is None


def test_gaps_and_time_per_token() -> None:
    found = report(record(arrivals=(1.0, 1.25, 2.0))).latency_s

    assert found.itl is not None
    assert (found.itl.count, found.itl.mean, found.itl.max) == (2, 0.5, 0.75)
    assert found.tpot is not None
    assert found.tpot.mean == 0.5


def test_a_message_with_several_tokens_is_one_arrival() -> None:
    found = report(record(arrivals=(1.0, 2.0), tokens=(2, 4)))

    assert found.latency_s.itl is not None
    assert found.latency_s.itl.count == 1
    assert found.latency_s.tpot is not None
    # One second for the four tokens after the first message.
    assert found.latency_s.tpot.mean == 0.25
    assert found.tokens.per_message == 3


def test_a_message_without_tokens_is_no_arrival() -> None:
    found = record(arrivals=(1.0, 1.5, 2.0), tokens=(0, 1, 0))

    assert found.arrivals == array("d", [1.5])
    assert (found.ttft, found.tpot) == (1.5, None)


def test_gaps_do_not_reach_from_one_request_to_the_next() -> None:
    found = report(
        record(0, arrivals=(0.5, 1.0), tokens=(1, 1)), record(1, arrivals=(3.0, 3.5), tokens=(1, 1))
    )

    assert found.latency_s.itl is not None
    assert (found.latency_s.itl.count, found.latency_s.itl.max) == (2, 0.5)


def test_throughput_is_over_the_whole_run_and_of_what_succeeded() -> None:
    found = report(record(), record(1, prompt_tokens=30), record(2, status="INTERNAL"))

    assert found.per_second.requests == 2 / 4
    assert found.per_second.input_tokens == 40 / 4
    assert found.per_second.output_tokens == 6 / 4
    assert found.per_second.goodput is None


def test_failures_are_counted_by_status_with_the_first_one_s_words() -> None:
    found = report(
        record(0),
        record(1, status="UNAVAILABLE", message="gone"),
        record(2, status="INTERNAL", message="first"),
        record(3, status="INTERNAL", message="second"),
        record(4, status=INTERRUPTED),
        interrupted=True,
    )

    counts = found.requests
    assert (counts.sent, counts.succeeded, counts.failed, counts.unfinished) == (5, 1, 3, 1)
    assert [(each.status, each.count, each.message) for each in counts.failures] == [
        ("INTERNAL", 2, "first"),
        ("UNAVAILABLE", 1, "gone"),
    ]
    assert found.interrupted


@pytest.mark.parametrize(
    ("ttft", "tpot", "met"),
    [
        (1000, None, True),
        (999, None, False),
        (None, 500, True),
        (None, 499, False),
        (1000, 499, False),
    ],
)
def test_objectives(ttft: float | None, tpot: float | None, met: bool) -> None:
    settings = Settings(slo_ttft_ms=ttft, slo_tpot_ms=tpot)

    assert meets_objectives(record(), settings) is met
    assert report(record(), slo_ttft_ms=ttft, slo_tpot_ms=tpot).per_second.goodput == met / 4


def test_objectives_of_requests_with_one_token_or_none() -> None:
    both = Settings(slo_ttft_ms=5000, slo_tpot_ms=1)

    assert meets_objectives(record(arrivals=(1.0,), tokens=(1,)), both)
    assert not meets_objectives(record(arrivals=(), tokens=()), both)


def test_in_flight_mean_and_peak() -> None:
    intervals = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (6.0, 8.0)]
    records = [record(sent=sent, ended=ended) for sent, ended in intervals]
    found = in_flight(records, 10.0)

    # At 2.0 one ends as another begins: never three at a time.
    assert (found.mean, found.peak) == (0.8, 2)
    assert in_flight([], 0.0).peak == 0


def test_the_share_of_prompts_that_was_cached() -> None:
    found = report(record(cached_tokens=0), record(1, prompt_tokens=30, cached_tokens=30))

    assert found.tokens.cached_share == 0.75


def test_what_the_server_counted_meanwhile() -> None:
    found = report(record())

    assert found.server is not None
    assert (found.server.steps, found.server.preemptions) == (20, 3)


def test_nothing_at_all_is_a_report_too() -> None:
    found = report()

    assert found.requests.sent == 0
    assert found.latency_s.ttft is None
    assert found.tokens.cached_share is None
    assert found.per_second.output_tokens == 0


def test_json_holds_everything() -> None:
    found = report(record(), record(1, status="INTERNAL", message="x"), rate=2, slo_ttft_ms=9)

    assert Report.model_validate_json(found.model_dump_json()) == found
    required = Report.model_json_schema()["required"]
    parts = {"settings", "requests", "per_second", "latency_s", "tokens", "in_flight"}
    assert parts < set(required)


def test_the_table_shows_counts_latencies_and_failures() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(report(record(), record(1, status="INTERNAL", message="no [1, 2]")), console)
    text = console.export_text()

    assert "1 of 2 succeeded, 1 failed, in 4.0 s" in text
    for row in ("TTFT │ 1,000.0", "TPOT │   500.0", "INTERNAL │ 1"):
        assert row in text
    assert "no [1, 2]" in text
