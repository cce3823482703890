"""The Ray actor around a rank: Ray places it, starts it and tells of its death; nothing more.

Steps do not travel through Ray (an actor call costs milliseconds, the socket a tenth of one), so
the one long call `run` is both the rank's life and, when its ref ends, its death notice.
"""

from __future__ import annotations

import contextlib

import psutil
import ray

from shards.config import ShardConfig


@ray.remote(max_restarts=0, max_task_retries=0)
class ShardActor:
    """Holds one tensor-parallel shard. Restarts are up to the driver, who owns rank and epoch."""

    def __init__(self, config: ShardConfig) -> None:
        self._config = config

    def run(self, address: str, token: str) -> None:
        from shards.worker import serve

        serve(self._config, address, token)


def end_process(pid: int) -> None:
    """SIGKILL a rank of this machine, also one that is stopped; not who has its number since."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "ShardActor" in " ".join(process.cmdline()):
            process.kill()
