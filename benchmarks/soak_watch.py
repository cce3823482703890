"""What a soak looks at: the memory of a process tree, and the server's log."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

_ERROR = re.compile(r"\[(error|critical)\s*\]|^Traceback \(most recent call last\)")
# The first and the last of so many samples in a row are compared, by their median.
_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Growth:
    """RSS of a process, in bytes, when the load had settled and at the end."""

    pid: int
    name: str
    early: float
    late: float

    @property
    def share(self) -> float:
        return self.late / self.early - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """RSS in bytes of each process, by pid, and the server's load, `seconds` after the start."""

    seconds: float
    load: dict[str, Any]
    rss: dict[int, int]


@dataclass(slots=True)
class Watch:
    """The tree below `root`, None for no process at all. `known` names some of its pids."""

    root: int | None
    known: Mapping[int, str]
    samples: list[Sample] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def take(self, seconds: float, load: dict[str, Any]) -> None:
        """Note how things stand."""
        rss: dict[int, int] = {}
        for process in self._tree():
            # A process may end while it is looked at; a zombie has no memory.
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    rss[process.pid] = process.memory_info().rss
                    self.names.setdefault(process.pid, self._name(process))
        self.samples.append(Sample(seconds, load, rss))

    def _tree(self) -> list[psutil.Process]:
        if self.root is None:
            return []
        root = psutil.Process(self.root)
        return [root, *root.children(recursive=True)]

    def _name(self, process: psutil.Process) -> str:
        if process.pid in self.known:
            return self.known[process.pid]
        # Ray names its processes in their command lines, "ray::..." or by the script they run.
        words = [word.rpartition("/")[2] for word in process.cmdline()[:6]]
        telling = [word for word in words if word and not word.startswith(("-", "python"))]
        return (telling or [process.name()])[0][:40]


def growth(samples: Sequence[Sample], names: Mapping[int, str], settled: float) -> list[Growth]:
    """Of every process that was there from `settled` seconds to the end, the largest first."""
    late = samples[-_SAMPLES:]
    early = [sample for sample in samples if sample.seconds >= settled][:_SAMPLES]
    both = [*early, *late]
    pids = set.intersection(*(set(sample.rss) for sample in both)) if early else set()
    found = [Growth(pid, names[pid], _median(early, pid), _median(late, pid)) for pid in pids]
    return sorted(found, key=lambda each: -each.late)


def newcomers(samples: Sequence[Sample], settled: float) -> set[int]:
    """Processes at the end that were not there at `settled` seconds."""
    first = next((sample for sample in samples if sample.seconds >= settled), samples[-1])
    return samples[-1].rss.keys() - first.rss.keys()


def error_lines(log: Iterable[str]) -> list[str]:
    """The lines of a server's log, text or JSON, that tell of an error."""
    return [line.rstrip("\n") for line in log if _is_error(line)]


def _is_error(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return _ERROR.search(line) is not None
    return isinstance(entry, dict) and entry.get("level") in ("error", "critical")


def _median(samples: Sequence[Sample], pid: int) -> float:
    return statistics.median(sample.rss[pid] for sample in samples)
