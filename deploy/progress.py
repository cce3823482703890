"""How a start goes, on the terminal. Everything on stderr: stdout is for results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deploy.start_report import Progress as Event


class StartProgress:
    """One line per phase; a bar where it is known how much there is to do. Called with events."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = ""
        self._task = progress.add_task("", total=None)

    def __call__(self, event: Event) -> None:
        self.phase(event.phase)
        self._progress.update(
            self._task, total=event.total or None, completed=min(event.done, event.total)
        )

    def phase(self, name: str) -> None:
        """A phase begins; the one before is done."""
        if name == self._phase:
            return
        self._phase = name
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=None)

    def stop(self) -> None:
        """Take the line away."""
        self._progress.stop()


@contextlib.contextmanager
def shown_progress() -> Iterator[StartProgress]:
    """Shown on a terminal only, so that logs stay clean."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        yield StartProgress(progress)
