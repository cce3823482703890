"""The files that a result becomes: JSON with every sample, Markdown with the tables, SVG plots."""

from __future__ import annotations

from pathlib import Path

from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.plot import save
from deploy.bench.suite.result import Result


def write(result: Result, folder: Path, *, plots: bool = True) -> list[Path]:
    """`folder`/BENCHMARK.json, .md and an .svg for each plot; returns what was written. Raises
    `BenchmarkError` where `folder` cannot be written."""
    paths = [folder / f"{result.benchmark}.json", folder / f"{result.benchmark}.md"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(result.model_dump_json(indent=2) + "\n")
        paths[1].write_text(result.markdown())
        for number, plot in enumerate(result.plots if plots else (), start=1):
            suffix = f"-{number}" if len(result.plots) > 1 else ""
            paths.append(folder / f"{result.benchmark}{suffix}.svg")
            save(plot, paths[-1])
    except OSError as error:
        raise BenchmarkError(f"--output {folder} cannot be written: {error.strerror}") from error
    return paths
