"""The directory of a Ray cluster: a detached actor that whoever comes first starts."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from deploy.fleet.directory import Entry, Listing, SoftDirectory
from shards.errors import HeadwiseError

_NAME = "directory"
_NAMESPACE = "headwise"
# Each replica has one call waiting there.
_MOST_WAITING = 10_000


class DirectoryLost(HeadwiseError):
    """The directory's process is gone; the next call finds, or starts, another one."""


class RayDirectory:
    """`deploy.fleet.directory.Directory` by way of Ray."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def meet(self, entry: Entry | None, known: tuple[float, int] | None) -> Listing:
        """Raises `DirectoryLost`."""
        listing: Listing = await self._call("meet", entry, known)
        return listing

    async def leave(self, replica: str) -> None:
        """Raises `DirectoryLost`."""
        await self._call("leave", replica)

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            if self._actor is None:
                # Asks Ray's head, which may take its time to answer.
                self._actor = await asyncio.to_thread(_actor)
            return await getattr(self._actor, method).remote(*arguments)
        except (RayError, ConnectionError, TimeoutError, ValueError) as error:
            self._actor = None
            raise DirectoryLost(f"{type(error).__name__}: {error}") from error


def _actor() -> Any:
    """The one that is there, or a new one."""
    return (
        ray.remote(SoftDirectory)
        .options(
            name=_NAME,
            namespace=_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            # Not in the placement group of the replica that happens to start it.
            scheduling_strategy="DEFAULT",
            max_restarts=-1,
            max_concurrency=_MOST_WAITING,
        )
        .remote()
    )
