"""What every benchmark returns: samples, tables and plots, as data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from deploy.bench.suite.environment import Environment

Cell = str | int | float | None
Key = TypeVar("Key", bound=tuple[str | int, ...])


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measurement(_Frozen):
    """Every sample of one measured quantity, in the order taken. `of` says of what: engine, ranks,
    batch and the like."""

    of: dict[str, str | int]
    quantity: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Table(_Frozen):
    """Cells that are None are shown as "-": not measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _row(self.columns), _row("---" for _ in self.columns)]
        return "\n".join([*lines, *(_row(map(shown, row)) for row in self.rows)]) + "\n"


class Series(_Frozen):
    """One line of a plot; `dashed` for what is not measured: limits, predictions."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False


class Plot(_Frozen):
    """Lines over numbers; axes are logarithmic to base 2 (x) and 10 (y) where asked for."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


class Result(_Frozen):
    """One run of one benchmark. `notes` say what was left out and why."""

    benchmark: str
    environment: Environment
    settings: dict[str, Any]
    measurements: tuple[Measurement, ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [f"## {self.benchmark}\n", f"{self.environment.sentence()}\n", f"{settings}\n"]
        parts += [table.markdown() for table in self.tables]
        parts += [f"- {note}\n" for note in self.notes]
        return "\n".join(parts)


def measurements_of(
    found: Mapping[Key, Sequence[float]], names: Sequence[str], quantity: str, unit: str
) -> tuple[Measurement, ...]:
    """From samples by key to measurements; `names` are those of the key's parts."""
    measurements = []
    for key, values in found.items():
        of = dict(zip(names, key, strict=True))
        measurements.append(Measurement(of=of, quantity=quantity, unit=unit, values=tuple(values)))
    return tuple(measurements)


def shown(cell: Cell) -> str:
    """Three significant digits, and no fewer than the whole number."""
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
