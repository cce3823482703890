"""How a run goes, on the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.bench.record import OK, Record
from deploy.bench.run import OnRecord


@contextlib.contextmanager
def shown_progress(requests: int | None) -> Iterator[OnRecord]:
    """Call it with each record that is over. `requests` is None where a run ends by time."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = progress.add_task("requests", total=requests)
    failed = 0

    def on_end(record: Record) -> None:
        nonlocal failed
        failed += record.status != OK
        text = f"requests, {failed} failed" if failed else "requests"
        progress.update(task, advance=1, description=text)

    with progress:
        yield on_end
