"""The ranks of one model copy as one thing: formed, sent plans, asked for results, stopped.

Who starts the ranks is the launcher's affair (`cluster/shard_group.py` uses Ray); everything else
about them, from the first greeting to the reason of their death, is here. No ray, no tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import StartupError
from cluster.links import RankGone, RankLinks
from shards.collectives.segment import abort_segment, create_segment
from shards.config import ShardConfig
from shards.contract import (
    Failure,
    FromRank,
    Hello,
    Join,
    Joined,
    Loaded,
    Progress,
    Query,
    RankStatus,
    StepPlan,
    StepResult,
    Stop,
    Tokenizer,
)
from shards.errors import HeadwiseError, NotEnoughMemory

# A slot holds one rank's part of a collective; a larger tensor goes through it piece by piece.
_SEGMENT_BYTES = 4 << 20
# After the first sign of trouble, how long to listen for what the other ranks have to say of it.
_DIAGNOSIS_S = 1.0

OnProgress = Callable[[str, int, int], None]
"""What is being done, and how much of how much: ("loading weights", bytes, bytes)."""


class RanksLost(HeadwiseError):
    """The group cannot compute any more; `rank` is the one at fault, where that is known."""

    def __init__(self, cause: str, rank: int | None) -> None:
        super().__init__(cause)
        self.rank = rank


@dataclass(frozen=True, slots=True)
class Placement:
    """Where ranks will run: one node id per rank. `listen` is the address that the driver must
    listen on for them, None where all are on the driver's own node."""

    nodes: tuple[str, ...]
    listen: str | None

    @property
    def one_host(self) -> bool:
        return self.listen is None

    def host_ranks(self, rank: int) -> int:
        """How many ranks share this one's node."""
        return self.nodes.count(self.nodes[rank])


class Launcher(Protocol):
    """Starts ranks and knows when one has ended."""

    def place(self) -> Placement:
        """Reserve room for every rank, or raise `StartupError`."""
        ...

    def launch(self, shards: Sequence[ShardConfig], links: RankLinks) -> None:
        """Start a rank for each config; it connects to `links`. A death wakes the links."""
        ...

    def deaths(self) -> dict[int, str]:
        """The ranks that have ended, and why."""
        ...

    def stop(self, grace_s: float) -> None:
        """End what is still running after `grace_s` seconds, and give back the room. Idempotent."""
        ...


@dataclass(slots=True)
class RankState:
    """What is known of one rank."""

    hello: Hello | None = None
    loaded: Loaded | None = None
    progress: tuple[int, int] = (0, 0)
    status: RankStatus | None = None
    failure: Failure | None = None
    gone: bool = False


@dataclass(slots=True)
class _Epoch:
    number: int
    segment: int | None = None
    store: object | None = None
    joined: set[int] = field(default_factory=set)


class RankGroup:
    """`world` ranks that compute together. One thread calls everything but `wake`."""

    def __init__(
        self,
        world: int,
        launcher: Launcher,
        *,
        collective: str,
        block_bytes: Sequence[int],
        max_blocks: int,
        start_timeout_s: float,
    ) -> None:
        """`block_bytes[r]`: what one KV block costs rank r. `max_blocks`: more would be idle."""
        self.world = world
        self.states = [RankState() for _ in range(world)]
        self.blocks = 0
        self.lost: RanksLost | None = None
        self._launcher = launcher
        self._collective = collective
        self._block_bytes = tuple(block_bytes)
        self._max_blocks = max_blocks
        self._start_timeout_s = start_timeout_s
        self._links: RankLinks | None = None
        self._epoch = _Epoch(0)
        self._asked: set[int] = set()

    @property
    def epoch(self) -> int:
        return self._epoch.number

    def start(
        self,
        placement: Placement,
        shards: Sequence[ShardConfig],
        on_progress: OnProgress | None = None,
        tokenizer: Callable[[], Tokenizer | None] = lambda: None,
    ) -> None:
        """Launch the ranks, wait until all have loaded, and form the first epoch.

        `tokenizer`, called in between, gives what rank 0 needs to hold texts to grammars. Raises
        `StartupError` with the rank and its cause, or `NotEnoughMemory`.
        """
        report = on_progress or (lambda what, done, total: None)
        deadline = time.monotonic() + self._start_timeout_s
        self._links = RankLinks(self.world, placement.listen)
        report("starting ranks", 0, self.world)
        self._launcher.launch(shards, self._links)
        self._await(lambda state: state.hello is not None, "start", deadline, report)
        self._await(lambda state: state.loaded is not None, "load its weights", deadline, report)
        self.blocks = self._blocks_that_fit()
        known = tokenizer()
        if known is not None:
            self._links.send(known, rank=0)
        self._form_epoch(placement)
        self._await(
            lambda state: state.hello is not None and state.hello.rank in self._epoch.joined,
            "join the group",
            deadline,
            report,
        )

    def send(self, plan: StepPlan) -> None:
        self._open_links().send(plan)

    def ask(self) -> None:
        """Ask every rank for its `RankStatus`, which it answers between two steps."""
        self._asked = set(range(self.world))
        self._open_links().send(Query())

    @property
    def answered(self) -> bool:
        """Whether every rank has answered since `ask`; `states` have what they said."""
        return not self._asked

    def poll(self, timeout_s: float | None) -> list[StepResult]:
        """Results that have arrived; waits at most `timeout_s`. Raises `RanksLost`."""
        results = []
        for message in self._open_links().poll(timeout_s):
            if isinstance(message, StepResult):
                results.append(message)
            else:
                self._take(message)
        if self._trouble():
            raise self._diagnose()
        return results

    def wake(self) -> None:
        """End a `poll` early; from any thread."""
        if self._links is not None:
            self._links.wake()

    def stuck(self, seconds: float) -> RanksLost:
        """The error for a step that nobody answered: asks the ranks for the reason."""
        lost = self._diagnose()
        if lost.rank is not None:
            return lost
        return RanksLost(f"no rank answered a step within {seconds:g} s", None)

    def stop(self, grace_s: float = 2.0) -> None:
        """Let the ranks leave, end those that do not, and give everything back. Idempotent."""
        self._abort_collective()
        if self._links is not None:
            self._links.send(Stop())
            self._links.poll(0)
        self._launcher.stop(grace_s)
        if self._links is not None:
            self._links.close()
            self._links = None
        self._close_epoch()

    def _open_links(self) -> RankLinks:
        if self._links is None:
            raise RuntimeError("the group is not started")
        return self._links

    def _take(self, message: FromRank | RankGone) -> None:
        if isinstance(message, StepResult):
            return  # of a step that nobody waits for any more
        state = self.states[message.rank]
        match message:
            case Hello():
                state.hello = message
            case Progress():
                state.progress = (message.done, message.total)
            case Loaded():
                state.loaded = message
            case RankStatus():
                state.status = message
                self._asked.discard(message.rank)
            case Joined() if message.epoch == self._epoch.number:
                self._epoch.joined.add(message.rank)
            case Failure():
                state.failure = message
            case RankGone():
                state.gone = True

    def _await(
        self,
        done: Callable[[RankState], bool],
        what: str,
        deadline: float,
        report: OnProgress,
    ) -> None:
        links = self._open_links()
        reported = [state.progress for state in self.states]
        while not all(done(state) for state in self.states):
            left = deadline - time.monotonic()
            if left <= 0:
                late = [rank for rank, state in enumerate(self.states) if not done(state)]
                raise StartupError(
                    f"rank {late[0]} did not {what} within {self._start_timeout_s:g} s; "
                    "look at its log, or raise start_timeout_s"
                )
            for message in links.poll(min(left, 1.0)):
                self._take(message)
            loading = [state.progress for state in self.states]
            if loading != reported:
                reported = loading
                report("loading weights", sum(d for d, _ in loading), sum(t for _, t in loading))
            if self._trouble():
                raise StartupError(str(self._diagnose()))

    def _trouble(self) -> bool:
        return bool(self._launcher.deaths()) or any(
            state.gone or state.failure is not None for state in self.states
        )

    def _diagnose(self) -> RanksLost:
        self.lost = self._find_cause()
        return self.lost

    def _find_cause(self) -> RanksLost:
        """Free the survivors from their collective, hear everyone, and name the first cause.

        A rank that vanished without a word is the likeliest cause; then one that reports an error
        of its own; then one that others wait for in vain.
        """
        self._abort_collective()
        deadline = time.monotonic() + _DIAGNOSIS_S
        links = self._open_links()
        while (left := deadline - time.monotonic()) > 0:
            if all(s.gone or s.failure is not None or s.hello is None for s in self.states):
                break
            for message in links.poll(left):
                self._take(message)
        deaths = self._launcher.deaths()
        for rank, state in enumerate(self.states):
            if state.failure is None and (state.gone or rank in deaths):
                return RanksLost(f"{self._name(rank)} died ({deaths.get(rank, 'killed')})", rank)
        failures = [s.failure for s in self.states if s.failure and not s.failure.aborted]
        own = [failure for failure in failures if failure.suspect < 0]
        if own:
            return RanksLost(f"{self._name(own[0].rank)} failed: {own[0].message}", own[0].rank)
        if failures:
            suspect = failures[0].suspect
            return RanksLost(
                f"{self._name(suspect)} did not answer ({failures[0].message})", suspect
            )
        return RanksLost("the shard group stopped answering", None)

    def _name(self, rank: int) -> str:
        hello = self.states[rank].hello
        return f"rank {rank}" if hello is None else f"rank {rank} (pid {hello.pid}, {hello.host})"

    def _blocks_that_fit(self) -> int:
        rooms = [0 if s.loaded is None else s.loaded.kv_bytes for s in self.states]
        fits = [room // block for room, block in zip(rooms, self._block_bytes, strict=True)]
        tightest = min(range(self.world), key=fits.__getitem__)
        if fits[tightest] < 1:
            raise NotEnoughMemory(
                f"rank {tightest} has {rooms[tightest]:,} bytes for its KV cache, and one block "
                f"takes {self._block_bytes[tightest]:,}; give more with --kv-memory, or use more "
                "ranks"
            )
        return min(fits[tightest], self._max_blocks)

    def _form_epoch(self, placement: Placement) -> None:
        self._close_epoch()
        epoch = self._epoch = _Epoch(self._epoch.number + 1)
        rendezvous = ""
        if self._collective == "shared_memory":
            epoch.segment = create_segment(self.world, _SEGMENT_BYTES)
        elif self._collective in ("gloo", "nccl", "symmetric_memory"):
            from shards.collectives.rendezvous import host_store

            epoch.store, rendezvous = host_store(placement.listen or "127.0.0.1")
        join = Join(epoch.number, self.blocks, rendezvous)
        self._open_links().send(join, epoch.segment)

    def _abort_collective(self) -> None:
        if self._epoch.segment is not None:
            abort_segment(self._epoch.segment)

    def _close_epoch(self) -> None:
        if self._epoch.segment is not None:
            os.close(self._epoch.segment)
            self._epoch.segment = None
        self._epoch.store = None
