"""The command `headwise`. Subcommands import what is heavy only when they run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deploy.commands.bench import bench
from deploy.commands.chat import chat
from deploy.commands.generate import generate
from deploy.commands.serve import serve
from deploy.commands.status import status
from deploy.plan import plan
from deploy.signals import Interrupted
from deploy.version import version as version_of_headwise
from shards.errors import HeadwiseError

app = typer.Typer(
    name="headwise",
    help="Serve language models, cut along whole attention heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, plan, generate, chat, status):
    app.command()(command)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headwise {version_of_headwise()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve language models, cut along whole attention heads."""


def main() -> None:
    """What goes wrong in a way that a user can mend is one sentence on stderr, and exit code 1."""
    try:
        app()
    except Interrupted as error:
        typer.echo(f"headwise: {error}", err=True)
        sys.exit(error.exit_code)
    except HeadwiseError as error:
        typer.echo(f"headwise: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output is gone (`headwise generate ... | head`).
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
