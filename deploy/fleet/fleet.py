"""Keeps an edge's models what the fleet's replicas are: links to each, a router for each version.

Links are opened to whoever the directory lists, and stay until they break: once everybody is
linked, the directory may be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import structlog

from cluster.request import Generator
from cluster.text import TextCodec
from deploy.edge.models import Models, Served, ServerFacts
from deploy.edge.text import Texts
from deploy.fleet.directory import HEARTBEAT_SECONDS, Directory, Entry, Listing
from deploy.fleet.remote import RemoteGenerator
from deploy.fleet.router import Member, Router
from deploy.fleet.wire import LinkBroken
from shards.errors import HeadwiseError

# A model whose last replica is gone is UNAVAILABLE for so long, which says "try again", before
# its name is unknown.
_FORGET_SECONDS = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Local:
    """The replica of this process. `version`, `since`: as `Entry` has them."""

    replica: str
    version: str
    since: float
    generator: Generator
    texts: Texts
    facts: ServerFacts


@dataclass(eq=False)
class _Version:
    """Replicas of a model whose answers are the same."""

    served: Served
    router: Router
    since: float
    empty_at: float | None = None


class Fleet:
    """Follows `directory` and keeps `models`. All methods belong to one event loop."""

    def __init__(self, directory: Directory, models: Models, local: Local) -> None:
        self._directory = directory
        self._models = models
        self._local = local
        self._retiring = False
        self._entry: Entry | None = None
        self._versions: dict[tuple[str, str], _Version] = {}
        self._links: dict[str, asyncio.Task[None]] = {}
        self._follower: asyncio.Task[None] | None = None
        self._join(
            Member(
                local.replica,
                local.generator,
                local.facts.max_sequences,
                is_retiring=lambda: self._retiring,
                local=True,
            ),
            (local.generator.model.name, local.version),
            local.since,
            local.texts,
            local.facts,
        )

    async def start(self) -> None:
        """Follow the directory from here on."""
        self._follower = asyncio.create_task(self._follow())

    async def announce(self, address: str, key: bytes) -> int:
        """Let the others link to this replica, whose `LinkServer` is at `address`; how many
        others there are."""
        local = self._local
        model = local.generator.model.name
        entry = Entry(local.replica, model, local.version, local.since, address, key)
        self._entry = entry
        listing = await self._meet_patiently()
        return len(listing.entries) - 1

    async def retire(self) -> bool:
        """Nothing new for this replica: its edge sends requests to the others; False where no
        other serves this model."""
        self._retiring, self._entry = True, None
        self._refresh()
        with contextlib.suppress(HeadwiseError):
            await self._directory.leave(self._local.replica)
        model = self._local.generator.model.name
        return any(
            version.router.is_open for (name, _), version in self._versions.items() if name == model
        )

    async def close(self) -> None:
        tasks = [*self._links.values(), *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for version in self._versions.values():
            version.served.texts.close()

    async def _meet_patiently(self, known: tuple[float, int] | None = None) -> Listing:
        """As `Directory.meet`; where that is lost, again until it is back."""
        while True:
            try:
                return await self._directory.meet(self._entry, known)
            except HeadwiseError as error:
                log.warning("no directory", cause=str(error))
                await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _follow(self) -> None:
        known: tuple[float, int] | None = None
        while True:
            listing = await self._meet_patiently(known)
            known = listing.revision
            for entry in listing.entries:
                if entry.replica != self._local.replica and entry.replica not in self._links:
                    self._links[entry.replica] = asyncio.create_task(self._link(entry))
            self._refresh()

    async def _link(self, entry: Entry) -> None:
        """Join the replica, until its link breaks; where it is still listed then, once more."""
        key = (entry.model, entry.version)
        try:
            remote = await RemoteGenerator.connect(entry)
            runs = asyncio.create_task(remote.run())
            try:
                texts = await self._texts(key, remote)
                member = Member(
                    entry.replica,
                    remote,
                    remote.facts.max_sequences,
                    is_retiring=lambda: remote.retiring,
                )
                self._join(member, key, entry.since, texts, remote.facts)
                remote.note_routed()
                log.info("replica joined", replica=entry.replica, model=entry.model)
                await runs
            finally:
                runs.cancel()
                self._part(key, entry.replica)
                log.info("replica left", replica=entry.replica, cause=remote.health().cause)
        except (LinkBroken, HeadwiseError) as error:
            log.info("replica cannot be linked", replica=entry.replica, cause=str(error))
        finally:
            del self._links[entry.replica]

    async def _texts(self, key: tuple[str, str], remote: RemoteGenerator) -> Texts:
        """Raises `CheckpointError` where the tokenizer cannot be read."""
        if key in self._versions:
            return self._versions[key].served.texts
        codec = None
        if remote.tokenizer is not None:
            codec = await asyncio.to_thread(TextCodec.unpack, remote.tokenizer)
        return Texts(codec, remote.model)

    def _join(
        self, member: Member, key: tuple[str, str], since: float, texts: Texts, facts: ServerFacts
    ) -> None:
        version = self._versions.get(key)
        if version is None:
            router = Router(member)
            version = _Version(Served(router, texts, facts), router, since)
            self._versions[key] = version
        version.router.add(member)
        version.since = max(version.since, since)
        version.empty_at = None
        self._refresh()

    def _part(self, key: tuple[str, str], replica: str) -> None:
        version = self._versions.get(key)
        if version is None:
            return
        version.router.remove(replica)
        if not version.router.members:
            version.empty_at = time.monotonic()
        self._refresh()

    def _refresh(self) -> None:
        """Serve the newest version of each model that takes requests, or else the newest."""
        self._forget()
        newest: dict[str, _Version] = {}
        for (model, _), version in sorted(
            self._versions.items(), key=lambda item: (item[1].router.is_open, item[1].since)
        ):
            newest[model] = version
        for model, version in newest.items():
            self._models.add(version.served)
            assert version.served.name == model
        for name in set(self._models.names) - set(newest):
            self._models.remove(name)

    def _forget(self) -> None:
        now = time.monotonic()
        for key, version in tuple(self._versions.items()):
            if version.empty_at is not None and now - version.empty_at > _FORGET_SECONDS:
                version.served.texts.close()
                del self._versions[key]
