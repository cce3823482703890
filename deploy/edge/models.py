"""What an edge serves: models by name, each with its generator, its text codec and its facts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import InvalidRequest, Unavailable, Violation
from cluster.request import Generator
from deploy.edge.errors import UnknownModel
from deploy.edge.text import Texts


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a generator does not know of the server it answers in; `started_at` is unix time."""

    version: str
    libraries: Mapping[str, str]
    device: str
    collective: str
    max_sequences: int
    max_step_tokens: int
    started_at: float


@dataclass(frozen=True, slots=True)
class Served:
    """One model."""

    generator: Generator
    texts: Texts
    facts: ServerFacts

    @property
    def name(self) -> str:
        return self.generator.model.name


class Models:
    """The models that requests may name. They come and go; all methods belong to one event loop."""

    def __init__(self, *served: Served) -> None:
        self._served = {one.name: one for one in served}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._served))

    @property
    def all(self) -> tuple[Served, ...]:
        return tuple(self._served[name] for name in self.names)

    def add(self, served: Served) -> None:
        """Serve a model, in place of another of its name."""
        self._served[served.name] = served

    def remove(self, name: str) -> None:
        del self._served[name]

    def get(self, name: str) -> Served:
        """The model of that name; the only one where `name` is empty. Raises `UnknownModel`,
        `InvalidRequest` for an empty name that could mean several, `Unavailable` without any."""
        if name in self._served:
            return self._served[name]
        if not self._served:
            raise Unavailable("no model is served yet: try again later")
        names = ", ".join(repr(known) for known in self.names)
        if name:
            raise UnknownModel(f"model {name!r} is not served here: there is {names}", name)
        if len(self._served) > 1:
            raise InvalidRequest(Violation("model", f"empty: name one of {names}"))
        return next(iter(self._served.values()))

    async def abort(self, request_id: str) -> bool:
        """End a request, whichever model has it; False if none has."""
        asked = [served.generator.abort(request_id) for served in self.all]
        return any(await asyncio.gather(*asked))
