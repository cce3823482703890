"""Interleaved rounds over started engines: who is measured, in which order, and what came of it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from deploy.bench.peers.contender import Contender, Decode, Point, Setup, Workload
from shards.errors import HeadwiseError

_WARM_TOKENS = 4

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine to start with `open`, which leaves its end to the stack, and what to measure."""

    setup: Setup
    workloads: tuple[Workload, ...]
    open: Callable[[ExitStack], Contender]


@dataclass(slots=True)
class Samples:
    """Tokens per second of each point, in the order measured; `notes` say what is missing."""

    values: defaultdict[Point, list[float]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


def measure(entries: Sequence[Entry], rounds: int, seed: int, samples: Samples, say: Say) -> None:
    """Start all of `entries`, warm them up, and add `rounds` samples of each to `samples`.

    What cannot be started, run or finished is noted and left out. Each round begins with another
    engine, so that none always follows the same one; all of a round get the same prompts' seed.
    """
    with ExitStack() as stack:
        turns: deque[tuple[Point, Contender]] = deque()
        for entry in entries:
            say(f"starting {entry.setup}, {entry.setup.precision}")
            try:
                contender = entry.open(stack)
            except (HeadwiseError, OSError) as error:
                samples.notes.append(f"{entry.setup}, {entry.setup.precision}, left out: {error}")
                continue
            for workload in entry.workloads:
                try:
                    contender.tokens_per_s(_short(workload), seed)
                except HeadwiseError as error:
                    samples.notes.append(f"{entry.setup}, {workload}, left out: {error}")
                else:
                    turns.append((Point(entry.setup, workload), contender))
        for number in range(1, rounds + 1):
            for point, contender in tuple(turns):
                say(f"round {number}: {point.setup}, {point.setup.precision}, {point.workload}")
                try:
                    found = contender.tokens_per_s(point.workload, seed + number)
                except HeadwiseError as error:
                    samples.notes.append(
                        f"{point.setup}, {point.workload}, left out in round {number}: {error}"
                    )
                    samples.values.pop(point, None)
                    turns.remove((point, contender))
                else:
                    samples.values[point].append(found)
            turns.rotate(-1)


def _short(workload: Workload) -> Workload:
    if isinstance(workload, Decode):
        return replace(workload, tokens=min(workload.tokens, _WARM_TOKENS))
    return workload
