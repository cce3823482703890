"""The numbers of a comparison as tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from deploy.bench.peers.bars import Medians, Scene
from deploy.bench.peers.contender import Point, Setup, Workload
from deploy.bench.peers.headwise import HeadwiseContender
from deploy.bench.suite.result import Cell, Plot, Series, Table


def engine_tables(scene: Scene, medians: Medians) -> Iterator[Table]:
    """A table for each model and precision: engines down, workloads across, and how many times
    the peer's number ours is."""
    for (model, precision), setups in _measured(medians).items():
        workloads = _workloads(medians, setups)
        ours = replace(scene.ours(precision), model=model)
        rows: list[tuple[Cell, ...]] = []
        for setup in setups:
            row: list[Cell] = [str(setup)]
            for workload in workloads:
                value = medians.get(Point(setup, workload))
                own = medians.get(Point(ours, workload))
                row += [value, own / value if value and own else None]
            rows.append(tuple(row))
        columns = ["tokens/s"]
        for workload in workloads:
            columns += [str(workload), "ours is x"]
        yield Table(title=f"{model}, {precision}", columns=tuple(columns), rows=tuple(rows))


def plots(scene: Scene, medians: Medians) -> Iterator[Plot]:
    """Decode rate by the number of streams, for each precision."""
    decodes = (scene.single, *scene.many)
    for (model, precision), setups in _measured(medians).items():
        if model != scene.model:
            continue
        lines = []
        for setup in setups:
            known = [each for each in decodes if Point(setup, each) in medians]
            if len(known) > 1:
                x = tuple(float(each.streams) for each in known)
                y = tuple(medians[Point(setup, each)] for each in known)
                lines.append(Series(label=str(setup), x=x, y=y))
        yield Plot(
            title=f"Decode of {model}, {precision}",
            x_label="sequences decoding side by side",
            y_label="tokens/s",
            log_x=True,
            series=tuple(lines),
        )


def _measured(medians: Medians) -> dict[tuple[str, str], list[Setup]]:
    found: dict[tuple[str, str], list[Setup]] = {}
    for setup in dict.fromkeys(point.setup for point in medians):
        found.setdefault((setup.model, setup.precision), []).append(setup)
    return found


def _workloads(medians: Medians, setups: list[Setup]) -> list[Workload]:
    return list(dict.fromkeys(point.workload for point in medians if point.setup in setups))


def phase_table(scene: Scene, engines: Mapping[Setup, HeadwiseContender]) -> Table:
    """What explains a bar that was missed; warming up is left out."""
    rows: list[tuple[Cell, ...]] = []
    names: list[str] = []
    for setup, contender in engines.items():
        spent = contender.phases_s()
        for workload in (scene.single, *scene.many):
            if workload in spent:
                names = list(spent[workload])
                milliseconds = [seconds * 1e3 for seconds in spent[workload].values()]
                engine = f"{setup}, {setup.precision}"
                rows.append((setup.model, engine, str(workload), *milliseconds))
    return Table(
        title="Where headwise's decode steps go: ms in rank 0's phases",
        columns=("model", "engine", "workload", *names),
        rows=tuple(rows),
    )
