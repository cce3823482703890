"""Cores that a rank keeps for itself.

Ranks meet in every all-reduce: one that shares its core with another, even for a scheduler's tick,
holds up all of them. So each takes cores that no other rank of this host has taken, and stays on
them. A core is taken by binding a name in the kernel's abstract socket namespace, which the kernel
gives back when the process ends, however it ends.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Cores:
    """The cores taken; `close` gives them back."""

    def __init__(self, numbers: tuple[int, ...], claims: tuple[socket.socket, ...]) -> None:
        self.numbers = numbers
        self._claims = claims

    def close(self) -> None:
        for claim in self._claims:
            claim.close()


def take(count: int) -> Cores | None:
    """Take `count` cores and stay on them with the calling thread and those it starts.

    None, and nothing changes, where the process may not use so many, where others have taken the
    rest, or where a quota of CPU time rather than a set of cores limits this container: its
    neighbours, whose claims are not seen from here, run on the same cores.
    """
    if _has_quota() or not hasattr(os, "sched_setaffinity"):
        return None
    claims: list[tuple[int, socket.socket]] = []
    for core in sorted(os.sched_getaffinity(0)):
        if len(claims) < count and (claim := _claim(core)) is not None:
            claims.append((core, claim))
    cores = Cores(tuple(core for core, _ in claims), tuple(claim for _, claim in claims))
    if len(claims) < count:
        cores.close()
        return None
    os.sched_setaffinity(0, cores.numbers)
    return cores


def _claim(core: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0headwise-core-{core}")
    except OSError:
        claim.close()
        return None
    return claim


def _has_quota() -> bool:
    try:
        return not _CGROUP_QUOTA.read_text().startswith("max")
    except OSError:
        return False
