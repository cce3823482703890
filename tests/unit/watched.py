"""Requests to a fake generator, by the way that every API goes, with watchers looking on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.request import Request, Stopping
from cluster.text import TextDelta
from deploy.edge.answers import Answers, Caller, Watcher
from deploy.edge.intake import Intake
from deploy.edge.models import Served
from deploy.edge.text import Texts
from tests.unit.edge_server import FACTS
from tests.unit.fakes import FakeCodec, FakeGenerator

GRPC = Caller("grpc")


def request(name: str, prompt: int = 3, max_tokens: int | None = 4, **changes: Any) -> Request:
    base = Request(name, tuple(b"abcdefgh" * prompt)[:prompt], stopping=Stopping(max_tokens))
    return replace(base, **changes)


async def answer(
    generator: FakeGenerator,
    watchers: Sequence[Watcher],
    asked: Request,
    caller: Caller = GRPC,
) -> list[TextDelta]:
    """Every delta of one request; raises what its reader is raised."""
    served = Served(generator, Texts(FakeCodec(), generator.model), FACTS)  # type: ignore[arg-type]
    try:
        intake = Intake(asked, with_text=True, skip_special_tokens=True)
        async with Answers(*watchers).of(served, intake, caller) as deltas:
            return [delta async for delta in deltas]
    finally:
        served.texts.close()
