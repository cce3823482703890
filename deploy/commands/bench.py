"""`headwise bench`: how fast a server answers, and what the engine behind it can do."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from deploy.bench.settings import BadLoad, Settings
from deploy.commands import connection
from deploy.commands.bench_peers import peers
from deploy.commands.bench_suite import (
    collectives,
    latency,
    perplexity,
    roofline,
    scaling,
    throughput,
)

if TYPE_CHECKING:
    from deploy.bench.report import Report
    from deploy.bench.run import Measured
    from headwise import AsyncClient

bench = typer.Typer(help="Measure a server, or engines on this machine.", no_args_is_help=True)
for command in (latency, throughput, scaling, collectives, peers, roofline, perplexity):
    bench.command()(command)

_INTERRUPTED = 130
_LENGTH = "Tokens: a number, lognormal:MEDIAN,SIGMA, or sharegpt for a mix like conversations."


@bench.command()
def serve(
    requests: Annotated[
        int | None, typer.Option(help="Send this many; 100, unless --duration is given.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Send nothing new after this many seconds.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Requests at a time; 8, or with --rate any number."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second (open loop), whether they are answered or not."),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Gamma shape of the gaps: 1 is Poisson, less is bursts, more is even."),
    ] = 1.0,
    input_len: Annotated[str, typer.Option(help=_LENGTH)] = "128",
    output_len: Annotated[str, typer.Option(help=_LENGTH)] = "64",
    prefix_len: Annotated[
        int, typer.Option(help="Tokens before the input that all prompts share.")
    ] = 0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Go on past end tokens, so that output lengths are exact.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int, typer.Option(help="Of arrivals, lengths, prompts and sampling alike.")
    ] = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the ones that count.")] = 1,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Goodput: the first token must be there within this.")
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Goodput: the others within this each, on average.")
    ] = None,
    address: connection.Address = connection.DEFAULT_ADDRESS,
    token_file: connection.TokenFile = None,
    tls_ca: connection.TlsCa = None,
    tls_certificate: connection.TlsCertificate = None,
    tls_key: connection.TlsKey = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that a request may take once it is sent.")
    ] = None,
    as_json: connection.AsJson = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Send random prompts to a server and report latencies and throughput.

    --concurrency C keeps C requests going (closed loop); --rate R sends R per second, whatever the
    server does (open loop). Ctrl-C reports what there is. Exits with 1 if no request succeeded.
    """
    settings = _settings(
        requests=requests,
        duration_s=duration,
        concurrency=concurrency,
        rate=rate,
        burstiness=burstiness,
        input_len=input_len,
        output_len=output_len,
        prefix_len=prefix_len,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        warmup=warmup,
        timeout_s=timeout,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
    )
    import headwise
    from deploy.bench.report import summarize

    started_at = datetime.now(UTC)
    with connection.errors_of(address):
        token, tls = connection.credentials(token_file, tls_ca, tls_certificate, tls_key)
        # A failed request is a result here, not something to be tried again.
        client = headwise.AsyncClient(address, token=token, tls=tls, retries=0)
        measured = asyncio.run(_measure(client, settings))
    report = summarize(address, started_at, settings, measured)
    _print(report, as_json, output)
    if report.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if not report.requests.succeeded:
        raise typer.Exit(1)


def _settings(**values: Any) -> Settings:
    try:
        return Settings(**values).completed()
    except ValidationError as error:
        raise BadLoad("; ".join(map(_fault, error.errors(include_url=False)))) from error


def _fault(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return str(message)
    option = str(fault["loc"][0]).removesuffix("_s").replace("_", "-")
    return f"--{option}={fault['input']}: {message[:1].lower()}{message[1:]}"


async def _measure(client: AsyncClient, settings: Settings) -> Measured:
    from deploy.bench.progress import shown_progress
    from deploy.bench.run import measure

    async with client:
        with shown_progress(settings.requests) as on_end:
            return await measure(client, settings, on_end)


def _print(report: Report, as_json: bool, output: Path | None) -> None:
    from rich.console import Console

    from deploy.bench.table import show

    if as_json:
        typer.echo(report.model_dump_json())
    else:
        show(report, Console())
    if output is not None:
        try:
            output.write_text(report.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise BadLoad(f"--output {output} cannot be written: {error.strerror}") from error
