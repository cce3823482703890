"""Replicas of a fleet in one process: fake generators, real links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.request import Request, Stopping
from cluster.text import TextCodec
from deploy.edge.models import Models
from deploy.edge.text import Texts
from deploy.fleet.directory import Directory, Entry
from deploy.fleet.fleet import Fleet, Local
from deploy.fleet.link_server import LinkServer
from deploy.fleet.remote import RemoteGenerator
from tests.unit.edge_server import FACTS
from tests.unit.fakes import MODEL, FakeGenerator

HOST = "127.0.0.1"
KEY = b"k" * 32


def request(name: str = "r", max_tokens: int = 5, **fields: Any) -> Request:
    plain = Request(id=name, prompt=(1, 2, 3), stopping=Stopping(max_tokens=max_tokens))
    return replace(plain, **fields)


def fake(name: str = "fake") -> FakeGenerator:
    return FakeGenerator(model=replace(MODEL, name=name))


@dataclass
class Linked:
    """A generator, and what another replica's edge has of it."""

    generator: FakeGenerator
    server: LinkServer
    remote: RemoteGenerator


@contextlib.asynccontextmanager
async def linked(generator: FakeGenerator | None = None) -> AsyncIterator[Linked]:
    generator = generator or FakeGenerator()
    server = LinkServer(generator, None, FACTS, KEY)
    entry = Entry("far", generator.model.name, "v1", 1.0, await server.start(HOST), KEY)
    remote = await RemoteGenerator.connect(entry)
    runs = asyncio.create_task(remote.run())
    try:
        yield Linked(generator, server, remote)
    finally:
        runs.cancel()
        await asyncio.gather(runs, return_exceptions=True)
        await server.close()


@dataclass
class Replica:
    """A member of a fleet: what it computes with, and what its edge serves."""

    name: str
    generator: FakeGenerator
    models: Models
    fleet: Fleet
    links: LinkServer

    async def kill(self) -> None:
        """Gone without a word."""
        await self.links.close()
        await self.fleet.close()


async def join(
    directory: Directory,
    name: str,
    model: str = "fake",
    version: str = "v1",
    since: float = 1.0,
    codec: TextCodec | None = None,
) -> Replica:
    """Let in as `deploy.replica` does it."""
    generator, models = fake(model), Models()
    texts = Texts(codec, generator.model)
    fleet = Fleet(directory, models, Local(name, version, since, generator, texts, FACTS))
    links = LinkServer(generator, codec, FACTS, KEY)
    await fleet.start()
    others = await fleet.announce(await links.start(HOST), KEY)
    await asyncio.wait_for(links.routed_by(others), 5)
    return Replica(name, generator, models, fleet, links)
