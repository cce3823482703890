"""Hours of a server's life in minutes: random load, and at the end nothing may be left of it.

    python -m benchmarks.soak --model path/to/model --tensor-parallel 2 --minutes 10
    python -m benchmarks.soak --address host:port --pid PID --log FILE --minutes 10

The first starts `headwise serve` itself. The second drives a server that runs: without --pid (the
process that was started, on this machine) its memory is not watched, without --log its log is not
read. Exits with 1 and says why if something was answered wrongly, if a sequence or a KV block is
left when all have gone, if a process has grown by more than 3% since the load had settled, if
processes were added, or if the log tells of an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from benchmarks.soak_load import Customers
from benchmarks.soak_watch import Growth, Watch, error_lines, growth, newcomers
from headwise import AsyncClient, HeadwiseError

MOST_GROWTH = 0.03
SETTLED_SECONDS = 120.0
_SAMPLE_SECONDS = 10.0
_FEWEST_SAMPLES = 20
# Everything is over within a step once the customers are gone; a busy machine is given more.
_IDLE_SECONDS = 30.0
_START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_MOST_LINES, _MOST_OF_A_LINE = 20, 500


@dataclass(frozen=True, slots=True)
class Target:
    """A server; `pid` is the root of its processes."""

    address: str
    pid: int | None
    log: Path | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it; `problems` is empty if all is well."""

    seconds: float
    done: dict[str, int]
    problems: list[str]
    growth: list[Growth]
    load: dict[str, Any]
    samples: list[dict[str, Any]]


async def soak(target: Target, minutes: float, width: int, seed: int) -> Verdict:
    """Load `target` for so long and see what is left of it."""
    async with AsyncClient(target.address) as client:
        await client.wait_until_ready(_START_SECONDS)
        model, server = await client.model_info(), await client.server_info()
        began, epoch = time.monotonic(), (await client.health()).epoch
        watch = Watch(target.pid, {rank.pid: f"rank {rank.rank}" for rank in server.ranks})
        customers = Customers(target.address, client, model, server, seed)
        await customers.learn()
        end = time.monotonic() + minutes * 60

        async def keep_watch() -> None:
            while True:
                try:
                    load = (await client.load(timeout=60)).model_dump()
                except HeadwiseError as error:
                    customers.faults.append(f"GetLoad: {error}")
                else:
                    await asyncio.to_thread(watch.take, time.monotonic() - began, load)
                await asyncio.sleep(min(_SAMPLE_SECONDS, minutes * 60 / _FEWEST_SAMPLES))

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(keep_watch())
            await customers.shop(width, lambda: time.monotonic() >= end)
            watching.cancel()
        load = await _idle(client)
        seconds = time.monotonic() - began
        watch.take(seconds, load)
        problems = list(customers.faults)
        if (await client.health()).epoch != epoch:
            problems.append("the shard group was built anew")
    settled = min(SETTLED_SECONDS, minutes * 60 / 5)
    grown = growth(watch.samples, watch.names, settled)
    problems += [f"{load[name]} {name} are left" for name in _LEFT if load[name]]
    problems += [
        f"{each.name} ({each.pid}) has grown by {each.share:.1%}"
        for each in grown
        if each.share > MOST_GROWTH
    ]
    added = newcomers(watch.samples, settled)
    problems += [f"{watch.names[pid]} ({pid}) was added" for pid in sorted(added)]
    if target.log is not None:
        with target.log.open(encoding="utf-8", errors="replace") as log:
            errors = error_lines(log)
        problems += [f"log: {line[:_MOST_OF_A_LINE]}" for line in errors[:_MOST_LINES]]
    return Verdict(
        seconds,
        dict(customers.done),
        problems,
        grown,
        load,
        [asdict(sample) for sample in watch.samples],
    )


_LEFT = ("running", "waiting", "kv_blocks_used")


async def _idle(client: AsyncClient) -> dict[str, Any]:
    """The load when nothing is left, or after some time of waiting for that."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while True:
        load = (await client.load(timeout=60)).model_dump()
        if time.monotonic() > deadline or not any(load[name] for name in _LEFT):
            return load
        await asyncio.sleep(0.1)


@contextlib.contextmanager
def served(model: str, options: list[str], log: Path | None) -> Iterator[Target]:
    """`headwise serve` on a free port, its log in a file, which is kept if it is `log`; ended by
    SIGTERM, which must go well."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        log = log or Path(folder) / "log"
        command = [sys.executable, "-m", "deploy.cli", "serve", "--model", model, "--json"]
        with log.open("w") as words:
            # A session of its own: Ctrl-C is for the soak, which then ends the server in order.
            process = subprocess.Popen(
                [*command, "--grpc-port", "0", "--log-format", "json", *options],
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                start_new_session=True,
            )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(log.read_text(errors="replace"))
            yield Target(json.loads(line)["grpc"], process.pid, log)
        finally:
            process.terminate()
            try:
                code = process.wait(_STOP_SECONDS)
            finally:
                process.kill()
    if code:
        raise SystemExit(f"the server ended with {code}")


def main(
    model: Annotated[str | None, typer.Option(help="Serve this model.")] = None,
    tensor_parallel: Annotated[int, typer.Option()] = 2,
    kv_memory: Annotated[
        str, typer.Option(help="Of each rank; small, so that it is all in use soon.")
    ] = "32MiB",
    address: Annotated[str | None, typer.Option(help="Or use the server there.")] = None,
    pid: Annotated[int | None, typer.Option(help="Its process, to watch its memory.")] = None,
    log: Annotated[Path | None, typer.Option(help="The server's log, to look for errors.")] = None,
    minutes: Annotated[float, typer.Option()] = 10.0,
    concurrency: Annotated[int, typer.Option(help="Customers at a time.")] = 16,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Random load for some minutes; exits with 1 if the server has not stood it."""
    if (model is None) == (address is None):
        raise typer.BadParameter("give either --model or --address")
    options = ["--tensor-parallel", str(tensor_parallel), "--kv-memory", kv_memory]
    with contextlib.ExitStack() as stack:
        target = (
            Target(address, pid, log)
            if address is not None
            else stack.enter_context(served(str(model), options, log))
        )
        try:
            verdict = asyncio.run(soak(target, minutes, concurrency, seed))
        except HeadwiseError as error:
            raise SystemExit(f"{target.address}: {error}") from error
    text = json.dumps(asdict(verdict), indent=None if output is None else 2)
    if output is not None:
        output.write_text(text + "\n")
    if as_json:
        typer.echo(text)
    else:
        show(verdict)
    if verdict.problems:
        raise typer.Exit(1)


def show(verdict: Verdict) -> None:
    console = Console()
    done = ", ".join(f"{count} {name}" for name, count in sorted(verdict.done.items()))
    console.print(f"{verdict.seconds:.0f} s: {done}")
    load = verdict.load
    console.print(
        f"{load['generated_tokens']} tokens in {load['steps']} steps, {load['preemptions']} "
        f"preemptions, {load['cached_tokens']} of {load['prompt_tokens']} prompt tokens cached"
    )
    table = Table("process", "pid", "RSS settled", "RSS at the end", "growth")
    for each in verdict.growth:
        sizes = (decimal(round(each.early)), decimal(round(each.late)))
        table.add_row(each.name, str(each.pid), *sizes, f"{each.share:+.1%}")
    console.print(table)
    for problem in verdict.problems:
        console.print(problem, style="red", markup=False)
    console.print("[green]nothing is left of it[/]" if not verdict.problems else "[red]failed[/]")


if __name__ == "__main__":
    typer.run(main)
