"""How much memory a rank may still take: the device's, and the container's limit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

# Share of the memory left after loading that the KV caches of a host may take unasked: a laptop
# has other things to do, a GPU has not.
KV_SHARE: Final[Mapping[str, float]] = {"cpu": 0.25, "cuda": 0.9}

_CGROUP = Path("/sys/fs/cgroup")


def _cgroup_left() -> int | None:
    """Bytes left under this container's cgroup v2 limit; None without one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cache = next(
            int(line.split()[1])
            for line in (_CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):
        return None
    return None if limit == "max" else max(0, int(limit) - used + cache)


def host_bytes_left() -> int:
    """Memory that can be taken on this host without swapping."""
    left = psutil.virtual_memory().available
    cgroup = _cgroup_left()
    return left if cgroup is None else min(left, cgroup)


def device_bytes_left(device: str) -> int:
    """Memory left on `device` ("cpu" or "cuda:0"), in bytes."""
    if device == "cpu":
        return host_bytes_left()
    from accelerate.utils import get_max_memory

    return int(get_max_memory()[int(device.partition(":")[2] or 0)])


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
