"""A report for people to read."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.bench.report import Distribution, Report


def show(report: Report, console: Console) -> None:
    """Print it: what was sent, what it came to, the latencies."""
    settings, counts = report.settings, report.requests
    ended = ", [yellow]interrupted[/]" if report.interrupted else ""
    console.print(
        f"[bold]{escape(report.model)}[/] at {report.address}, tensor parallel "
        f"{report.tensor_parallel} on {report.device}: {_loop(report)}, seed {settings.seed}{ended}"
    )
    console.print(_throughput(report))
    if counts.succeeded:
        console.print(_latencies(report))
    if report.tokens.per_message is not None and report.tokens.per_message > 1.01:
        console.print(
            f"ITL is between messages, which brought {report.tokens.per_message:.2f} tokens each"
        )
    if counts.failures:
        table = Table("status", "requests", "the first one said", title="failed")
        for each in counts.failures:
            table.add_row(each.status, str(each.count), escape(each.message))
        console.print(table)


def _loop(report: Report) -> str:
    settings = report.settings
    if settings.rate is None:
        return f"{settings.concurrency} at a time"
    shape = "" if settings.burstiness == 1 else f", burstiness {settings.burstiness:g}"
    limit = "" if settings.concurrency is None else f", at most {settings.concurrency} at a time"
    return f"{settings.rate:g} per second{shape}{limit}"


def _throughput(report: Report) -> Table:
    counts, rates, tokens = report.requests, report.per_second, report.tokens
    table = Table(show_header=False)
    unfinished = f", {counts.unfinished} unfinished" if counts.unfinished else ""
    table.add_row(
        "requests",
        f"{counts.succeeded} of {counts.sent} succeeded, {counts.failed} failed{unfinished}, in "
        f"{report.seconds:.1f} s",
    )
    table.add_row("requests/s", f"{rates.requests:.2f}")
    if rates.goodput is not None:
        table.add_row("goodput, requests/s", f"{rates.goodput:.2f}")
    cached = "" if not tokens.cached_share else f" ({tokens.cached_share:.0%} cached)"
    table.add_row("input tokens/s", f"{rates.input_tokens:.1f}{cached}")
    table.add_row("output tokens/s", f"{rates.output_tokens:.1f}")
    if tokens.input is not None and tokens.output is not None:
        table.add_row("tokens in, out", f"{tokens.input.mean:.0f}, {tokens.output.mean:.0f} (mean)")
    table.add_row(
        "in flight", f"{report.in_flight.mean:.1f} (mean), {report.in_flight.peak} (peak)"
    )
    if report.server is not None:
        table.add_row(
            "server", f"{report.server.steps} steps, {report.server.preemptions} preemptions"
        )
    return table


def _latencies(report: Report) -> Table:
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max")
    for column in table.columns[1:]:
        column.justify = "right"
    latency = report.latency_s
    rows = {
        "TTFT": latency.ttft,
        "ITL": latency.itl,
        "TPOT": latency.tpot,
        "E2E": latency.e2e,
        "send lag": report.send_lag_s,
    }
    for name, found in rows.items():
        if found is not None:
            table.add_row(name, *_milliseconds(found))
    return table


def _milliseconds(found: Distribution) -> list[str]:
    values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
    return [f"{value * 1e3:,.1f}" for value in values]
