"""The ranks of one model copy as one thing: formed, sent plans, asked for results, rebuilt.

Who starts the ranks is the launcher's affair (`cluster/shard_group.py` uses Ray); everything else
about them, from the first greeting to the reason of their death, is here. No ray, no tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.diagnosis import RanksLost, RankState, find_cause, name_of
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
    Leave,
    Left,
    Loaded,
    Progress,
    Query,
    RankStatus,
    StepPlan,
    StepResult,
    Stop,
    Tokenizer,
)
from shards.errors import NotEnoughMemory

# A slot holds one rank's part of a collective; a larger tensor goes through it piece by piece.
_SEGMENT_BYTES = 4 << 20
# After the first sign of trouble, how long to listen for what the other ranks have to say of it.
_DIAGNOSIS_S = 1.0
# Once a rank is known to be dead: its death notice, and who died with it.
_DEATHS_S = 0.2
# How long a rank may take out of a step whose collective was aborted: the rest of a layer.
_LEAVE_S = 10.0
_REBUILD_TICK_S = 0.5

OnProgress = Callable[[str, int, int], None]
"""What is being done, and how much of how much: ("loading weights", bytes, bytes)."""


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

    def replace(self, shard: ShardConfig, links: RankLinks, process: Hello | None) -> None:
        """End a rank's process, also one that is stopped, and start another in its room; does not
        wait for either. `process` is what the one to end said of itself."""
        ...

    def deaths(self) -> dict[int, str]:
        """The ranks that have ended and were not replaced, and why."""
        ...

    def stop(self, grace_s: float) -> None:
        """End what is still running after `grace_s` seconds, and give back the room. Idempotent."""
        ...


@dataclass(slots=True)
class _Epoch:
    number: int
    segment: int | None = None
    store: Any = None  # torch's TCPStore, for process groups
    joined: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Rebuild:
    """Until when every rank must hold its weights and have joined, and until when the survivors
    must have left `epoch`; whether the next one is being `formed`."""

    epoch: int
    deadline: float
    leave_by: float
    replaced: frozenset[int]
    formed: bool = False


class RankGroup:
    """`world` ranks that compute together. One thread calls everything but `wake`.

    When `poll` raises `RanksLost`, `rebuild` replaces the ranks at fault around those that are
    left: they keep their process and their weights, and all form a new epoch with an empty cache.
    Further calls of `poll` see to it until the group is `ready`.
    """

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
        self.lost: RanksLost | None = None  # the first cause of the outage
        self._launcher = launcher
        self._collective = collective
        self._block_bytes = tuple(block_bytes)
        self._max_blocks = max_blocks
        self._start_timeout_s = start_timeout_s
        self._links: RankLinks | None = None
        self._epoch = _Epoch(0)
        self._rebuild: _Rebuild | None = None
        self._placement = Placement((), None)
        self._shards: tuple[ShardConfig, ...] = ()
        self._tokenizer: Tokenizer | None = None
        self._asked: set[int] = set()

    @property
    def epoch(self) -> int:
        return self._epoch.number

    @property
    def ready(self) -> bool:
        """Every rank is in the epoch."""
        return self._rebuild is None

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
        self._placement, self._shards = placement, tuple(shards)
        self._links = RankLinks(self.world, placement.listen)
        report("starting ranks", 0, self.world)
        self._launcher.launch(shards, self._links)
        self._await(lambda state: state.hello is not None, "start", deadline, report)
        self._await(lambda state: state.loaded is not None, "load its weights", deadline, report)
        self.blocks = self._blocks_that_fit()
        self._tokenizer = tokenizer()
        self._tell_tokenizer()
        self._form_epoch()
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
        """Results of this epoch that have arrived; waits at most `timeout_s`. Raises `RanksLost`,
        but not before what the ranks computed until then was returned."""
        if self._trouble():
            timeout_s = 0
        elif self._rebuild is not None:
            timeout_s = _REBUILD_TICK_S if timeout_s is None else min(timeout_s, _REBUILD_TICK_S)
        results = []
        for message in self._open_links().poll(timeout_s):
            if isinstance(message, StepResult):
                if self.ready:
                    results.append(message)
            else:
                self._take(message)
        if self._trouble() and not results:
            raise self._diagnose()
        if self._rebuild is not None:
            self._go_on(self._rebuild)
        return results

    def rebuild(self, lost: RanksLost) -> None:
        """Begin the next epoch: end and start anew the ranks that `lost` names, and have the others
        leave this one. Does not block. Until it is `ready`, nothing can be sent."""
        now = time.monotonic()
        deadline = now + self._start_timeout_s if self._rebuild is None else self._rebuild.deadline
        unformed = self._rebuild is not None and not self._rebuild.formed
        before = self._rebuild.replaced if self._rebuild is not None and unformed else frozenset()
        replaced = before | set(lost.replace)
        self._rebuild = _Rebuild(self.epoch, deadline, now + _LEAVE_S, replaced)
        self._asked.clear()
        for rank in lost.replace:
            self._open_links().expect(rank)
            process, self.states[rank] = self.states[rank].hello, RankState()
            self._launcher.replace(self._shards[rank], self._open_links(), process)
        for state in self.states:
            state.failure = None

    def wake(self) -> None:
        """End a `poll` early; from any thread."""
        if self._links is not None:
            self._links.wake()

    def stuck(self, seconds: float) -> RanksLost:
        """The error for a step that nobody answered: asks the ranks for the reason."""
        lost = self._diagnose()
        if lost.rank is None or self.world == 1:
            cause = f"no rank answered a step within {seconds:g} s"
            lost = self.lost = RanksLost(cause, lost.rank, lost.replace, final=lost.final)
        return lost

    def stop(self, grace_s: float = 2.0) -> None:
        """Let the ranks leave, end those that do not, and give everything back. Idempotent."""
        self._abort_collective()
        if self._links is not None:
            self._links.send(Stop())
            self._links.poll(0)
            self._links.refuse()
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
            case Left():
                state.left = message.epoch
            case Joined() if message.epoch == self._epoch.number:
                self._epoch.joined.add(message.rank)
            case Failure() if not (message.stays and self._is_leaving(message.rank)):
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
        """Free the survivors from their collective, hear everyone, and name the cause."""
        links, began = self._open_links(), time.monotonic()
        self._abort_collective()
        links.send(Leave(self.epoch))
        while True:
            ended = [s.ended or r in self._launcher.deaths() for r, s in enumerate(self.states)]
            patience = _DEATHS_S if any(s.gone for s in self.states) else _DIAGNOSIS_S
            left = began + patience - time.monotonic()
            silent = [
                rank
                for rank, state in enumerate(self.states)
                if state.loaded is not None and state.left < self.epoch and not ended[rank]
            ]
            unexplained = any(
                s.gone and s.failure is None and r not in self._launcher.deaths()
                for r, s in enumerate(self.states)
            )
            if left <= 0 or not (silent or unexplained):
                break
            for message in links.poll(left):
                self._take(message)
        mute = [rank for rank in silent if self.states[rank].failure is None]
        lost = find_cause(self.states, self._launcher.deaths(), mute)
        if self.lost is None:
            self.lost = lost
        return lost

    def _is_leaving(self, rank: int) -> bool:
        """Its errors are those of an epoch that is known to have ended."""
        rebuild = self._rebuild
        return rebuild is not None and not rebuild.formed and self.states[rank].left < rebuild.epoch

    def _go_on(self, rebuild: _Rebuild) -> None:
        """Take the next step of a rebuild, where it is due. Raises `RanksLost`."""
        now = time.monotonic()
        loading = [rank for rank, state in enumerate(self.states) if state.loaded is None]
        if now >= rebuild.deadline:
            late = loading or sorted(set(range(self.world)) - self._epoch.joined)
            what = "load its weights" if loading else "join the group"
            cause = f"{name_of(late[0], self.states)} did not {what}"
            raise RanksLost(f"{cause} within {self._start_timeout_s:g} s", late[0], final=True)
        if rebuild.formed:
            if len(self._epoch.joined) == self.world:
                self._rebuild = self.lost = None
            return
        staying = [
            rank
            for rank, state in enumerate(self.states)
            if rank not in rebuild.replaced and state.left < rebuild.epoch
        ]
        if staying and now >= rebuild.leave_by:
            cause = f"{name_of(staying[0], self.states)} did not leave its step"
            raise RanksLost(f"{cause} within {_LEAVE_S:g} s", staying[0], staying)
        if not loading and not staying:
            if 0 in rebuild.replaced:
                self._tell_tokenizer()
            self._form_epoch()
            rebuild.formed = True

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

    def _tell_tokenizer(self) -> None:
        if self._tokenizer is not None:
            self._open_links().send(self._tokenizer, rank=0)

    def _form_epoch(self) -> None:
        self._close_epoch()
        epoch = self._epoch = _Epoch(self._epoch.number + 1)
        rendezvous = ""
        if self._collective == "shared_memory":
            epoch.segment = create_segment(self.world, _SEGMENT_BYTES)
        elif self._collective in ("gloo", "nccl", "symmetric_memory"):
            from shards.collectives.rendezvous import host_store

            epoch.store, rendezvous = host_store(self._placement.listen or "127.0.0.1")
        join = Join(epoch.number, self.blocks, rendezvous)
        self._open_links().send(join, epoch.segment)

    def _abort_collective(self) -> None:
        if self._epoch.segment is not None:
            abort_segment(self._epoch.segment)
        if self._epoch.store is not None:
            from shards.collectives.rendezvous import abort_epoch

            abort_epoch(self._epoch.store, self._epoch.number)

    def _close_epoch(self) -> None:
        if self._epoch.segment is not None:
            os.close(self._epoch.segment)
            self._epoch.segment = None
        self._epoch.store = None
