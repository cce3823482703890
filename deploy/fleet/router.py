"""The replicas of one model as one generator: each request goes where it is best served."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace

from cluster.errors import Overloaded, Unavailable
from cluster.request import Generator, Health, HealthState, Load, ModelInfo, RankInfo, Request
from deploy.fleet.affinity import Affinity, Chain, chain_of
from deploy.fleet.routed_stream import Attempt, RoutedStream

# The favourite of a prompt is given up when it is this much busier than another replica: as a
# factor, and on top a part of a full batch, since a cached prefix is worth a short wait.
_FAVOUR = 2.0
_SLACK = 0.25
_COMPUTING = (HealthState.READY, HealthState.DEGRADED)


@dataclass(eq=False)
class Member:
    """A replica: its generator, how many sequences it runs at a time, and whether it is about to
    go. `local`: in this process, where a token costs less than over a link."""

    name: str
    generator: Generator
    sequences: int
    is_retiring: Callable[[], bool]
    local: bool = False
    streams: int = field(default=0, init=False)

    @property
    def is_open(self) -> bool:
        """It takes new requests."""
        return not self.is_retiring() and self.generator.health().state in _COMPUTING

    @property
    def is_ready(self) -> bool:
        """It computes now."""
        return self.generator.health().state is HealthState.READY

    @property
    def pressure(self) -> float:
        """0 idle, 1 a full batch with a full KV cache, more where requests wait. What it last said
        of itself may be older than what it was sent from here since."""
        load = self.generator.load()
        sequences = max(load.running + load.waiting, self.streams)
        kv = load.kv_blocks_used / load.kv_blocks if load.kv_blocks else 0.0
        return (sequences / self.sequences + kv) / 2


class Router:
    """`cluster.request.Generator` over members that come and go.

    A prompt goes to the replica that has most of it in its KV cache, unless that one is much
    busier than another; else to the less busy one of two at random, which spreads the load even
    where what is known of it is old (Mitzenmacher, "The power of two choices", 2001).
    All methods belong to one event loop.
    """

    def __init__(self, member: Member, choice: random.Random | None = None) -> None:
        self._members = {member.name: member}
        self._affinity = Affinity()
        self._random = choice or random.Random()
        self._model = member.generator.model

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def add(self, member: Member) -> None:
        self._members[member.name] = member

    def remove(self, name: str) -> None:
        """Its streams are its own matter: they end, or go on elsewhere."""
        self._members.pop(name, None)

    @property
    def is_open(self) -> bool:
        """Some member takes new requests."""
        return any(member.is_open for member in self.members)

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        return tuple(
            replace(rank, replica=member.name)
            for member in self.members
            for rank in member.generator.ranks
        )

    def submit(self, request: Request) -> RoutedStream:
        return RoutedStream(request, self._attempt)

    async def abort(self, request_id: str) -> bool:
        # Every one is asked: who submitted it may have been another edge.
        asked = [member.generator.abort(request_id) for member in self.members]
        return any(await asyncio.gather(*asked))

    def load(self) -> Load:
        loads = [member.generator.load() for member in self.members]
        sums = {
            field.name: sum(getattr(load, field.name) for load in loads) for field in fields(Load)
        }
        return Load(**sums | {"block_size": loads[0].block_size if loads else 0})

    def health(self) -> Health:
        """That of the healthiest member, and the ranks of all of them."""
        if not self._members:
            cause = f"no replica of {self._model.name} is there: try again later"
            return Health(HealthState.NOT_READY, cause, 0.0, 0, ())
        healths = {member.name: member.generator.health() for member in self.members}
        ranks = tuple(
            replace(rank, replica=name) for name, health in healths.items() for rank in health.ranks
        )
        order = (*_COMPUTING, HealthState.STARTING, HealthState.NOT_READY)
        best = min(healths.values(), key=lambda health: order.index(health.state))
        return replace(best, ranks=ranks)

    def _attempt(self, request: Request, tried: Collection[str]) -> Attempt:
        """Submit to the best member that was not tried yet; the next best where it refuses."""
        refused = set(tried)
        chain = chain_of(request)
        refusal: Exception | None = None
        while (member := self._choose(chain, refused)) is not None:
            try:
                stream = member.generator.submit(request)
            except (Overloaded, Unavailable) as error:
                refusal = error
                refused.add(member.name)
                continue
            self._affinity.note(chain, member.name)
            return Attempt(member, stream)
        raise refusal or Unavailable(self._why_closed())

    def _choose(self, chain: Chain, refused: Collection[str]) -> Member | None:
        there = [m for m in self.members if m.name not in refused and m.is_open]
        # One whose ranks are being replaced would serve later, not never.
        there = [member for member in there if member.is_ready] or there
        if len(there) < 2:
            return there[0] if there else None
        two = self._random.sample(there, 2)
        best = min(two, key=lambda member: (member.pressure, not member.local))
        favourite = self._affinity.favourite(chain, {member.name for member in there})
        if favourite is None:
            return best
        loved = self._members[favourite]
        return loved if loved.pressure <= _FAVOUR * best.pressure + _SLACK else best

    def _why_closed(self) -> str:
        health = self.health()
        if health.state in _COMPUTING:
            return "the server is shutting down: try again"
        return health.cause
