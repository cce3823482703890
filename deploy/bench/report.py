"""From the records of a run to its report, which is what `--json` prints.

Latencies and throughput are those of the requests that succeeded. Percentiles interpolate linearly
between the two nearest values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import accumulate

import numpy as np
from pydantic import BaseModel, ConfigDict

from deploy.bench.record import INTERRUPTED, OK, Record
from deploy.bench.run import Measured
from deploy.bench.settings import Settings
from deploy.version import version


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Distribution(_Frozen):
    """Of `count` values; their unit is that of the field that holds it."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Failures(_Frozen):
    """Requests that ended with a gRPC status (CLIENT: found wrong on this side), and the words of
    the first of them."""

    status: str
    count: int
    message: str


class Counts(_Frozen):
    """Requests. `unfinished` were given up when the run was interrupted."""

    sent: int
    succeeded: int
    unfinished: int
    failures: tuple[Failures, ...]

    @property
    def failed(self) -> int:
        return sum(each.count for each in self.failures)


class Throughput(_Frozen):
    """Per second of the whole run, the last answers included; `goodput` are the requests that also
    kept to the objectives, None if there were none."""

    requests: float
    input_tokens: float
    output_tokens: float
    goodput: float | None


class Latency(_Frozen):
    """Seconds.

    `ttft` (time to first token) and `e2e` count from when a request was due, so that what the
    server delays is not left out. `itl` are the gaps between messages that bring tokens: one that
    brings several is one arrival. `tpot` is, per request, the time from its first such message to
    its last, over the tokens that came after the first.
    """

    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None


class Tokens(_Frozen):
    """`per_message` says how far `itl` is from being per token; `cached_share` is what the server
    took from its KV cache, of all prompts."""

    input: Distribution | None
    output: Distribution | None
    per_message: float | None
    cached_share: float | None


class InFlight(_Frozen):
    """Requests that were sent and not over, over the whole run."""

    mean: float
    peak: int


class ServerSide(_Frozen):
    """What the server counted during the run, other clients' work included."""

    steps: int
    preemptions: int


class Report(_Frozen):
    """One run. `send_lag_s` is how late requests of an open loop were sent."""

    headwise: str
    address: str
    model: str
    tensor_parallel: int
    device: str
    started_at: datetime
    settings: Settings
    interrupted: bool
    seconds: float
    requests: Counts
    per_second: Throughput
    latency_s: Latency
    tokens: Tokens
    in_flight: InFlight
    send_lag_s: Distribution | None
    server: ServerSide | None


def summarize(address: str, started_at: datetime, settings: Settings, measured: Measured) -> Report:
    """The report of a run."""
    records = measured.records
    good = [record for record in records if record.status == OK]
    return Report(
        headwise=version(),
        address=address,
        model=measured.model.name,
        tensor_parallel=measured.server.tensor_parallel,
        device=measured.server.device,
        started_at=started_at,
        settings=settings,
        interrupted=measured.interrupted,
        seconds=measured.seconds,
        requests=_counts(records),
        per_second=_throughput(good, settings, measured.seconds),
        latency_s=Latency(
            ttft=distribution(each.ttft for each in good),
            itl=_distribution(
                np.concatenate([np.diff(each.arrivals) for each in good] or [np.empty(0)])
            ),
            tpot=distribution(each.tpot for each in good),
            e2e=distribution(each.e2e for each in good),
        ),
        tokens=_tokens(good),
        in_flight=in_flight(records, measured.seconds),
        send_lag_s=(
            None
            if settings.rate is None
            else distribution(each.sent - each.due for each in records)
        ),
        server=_server_side(measured),
    )


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Of the values that are not None; None if there are none."""
    return _distribution(np.array([value for value in values if value is not None]))


def in_flight(records: Sequence[Record], seconds: float) -> InFlight:
    """Over `seconds` from the start. A request that ends as another is sent leaves room for it."""
    changes = sorted(
        [(record.sent, 1) for record in records] + [(record.ended, -1) for record in records]
    )
    busy = sum(record.ended - record.sent for record in records)
    return InFlight(
        mean=busy / seconds if seconds else 0.0,
        peak=max(accumulate(change for _, change in changes), default=0),
    )


def _distribution(values: np.ndarray) -> Distribution | None:
    if not values.size:
        return None
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99]).tolist()
    return Distribution(
        count=values.size,
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(values.max()),
    )


def _counts(records: Sequence[Record]) -> Counts:
    by_status: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_status[record.status].append(record)
    return Counts(
        sent=len(records),
        succeeded=len(by_status.pop(OK, ())),
        unfinished=len(by_status.pop(INTERRUPTED, ())),
        failures=tuple(
            Failures(status=status, count=len(failed), message=failed[0].message)
            for status, failed in sorted(by_status.items())
        ),
    )


def _throughput(good: Sequence[Record], settings: Settings, seconds: float) -> Throughput:
    def rate(amount: int) -> float:
        return amount / seconds if seconds else 0.0

    has_objective = settings.slo_ttft_ms is not None or settings.slo_tpot_ms is not None
    return Throughput(
        requests=rate(len(good)),
        input_tokens=rate(sum(record.prompt_tokens for record in good)),
        output_tokens=rate(sum(record.tokens for record in good)),
        goodput=(
            rate(sum(meets_objectives(record, settings) for record in good))
            if has_objective
            else None
        ),
    )


def meets_objectives(record: Record, settings: Settings) -> bool:
    """A request without a first token fails any objective for it; one without a second token meets
    any for the rest."""
    ttft, tpot = settings.slo_ttft_ms, settings.slo_tpot_ms
    if ttft is not None and (record.ttft is None or record.ttft * 1e3 > ttft):
        return False
    return tpot is None or record.tpot is None or record.tpot * 1e3 <= tpot


def _tokens(good: Sequence[Record]) -> Tokens:
    prompts = sum(record.prompt_tokens for record in good)
    messages = sum(len(record.arrivals) for record in good)
    return Tokens(
        input=distribution(record.prompt_tokens for record in good),
        output=distribution(record.tokens for record in good),
        per_message=sum(record.tokens for record in good) / messages if messages else None,
        cached_share=sum(record.cached_tokens for record in good) / prompts if prompts else None,
    )


def _server_side(measured: Measured) -> ServerSide | None:
    before, after = measured.before, measured.after
    # Counters that ran backwards are those of a server that was started anew.
    if after is None or after.steps < before.steps:
        return None
    return ServerSide(
        steps=after.steps - before.steps, preemptions=after.preemptions - before.preemptions
    )
