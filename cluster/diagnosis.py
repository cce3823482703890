"""What is known of each rank, and who is at fault when the group stops. Pure logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.contract import Failure, Hello, Loaded, RankStatus
from shards.errors import HeadwiseError


@dataclass(slots=True)
class RankState:
    """What is known of one rank; `left` is the newest epoch that it says it has left."""

    hello: Hello | None = None
    loaded: Loaded | None = None
    progress: tuple[int, int] = (0, 0)
    status: RankStatus | None = None
    failure: Failure | None = None
    gone: bool = False
    left: int = 0

    @property
    def ended(self) -> bool:
        """Its process has ended, or is about to: it can join no other epoch."""
        return self.gone or (self.failure is not None and not self.failure.stays)


class RanksLost(HeadwiseError):
    """The epoch has ended; `rank` is the one at fault, where that is known.

    `replace` are the ranks whose processes are of no use any more. Where it is `final`, others in
    their place would end in the same way.
    """

    def __init__(
        self,
        cause: str,
        rank: int | None,
        replace: Sequence[int] = (),
        *,
        final: bool = False,
    ) -> None:
        super().__init__(cause)
        self.rank = rank
        self.replace = tuple(replace)
        self.final = final


def name_of(rank: int, states: Sequence[RankState]) -> str:
    hello = states[rank].hello
    return f"rank {rank}" if hello is None else f"rank {rank} (pid {hello.pid}, {hello.host})"


def find_cause(
    states: Sequence[RankState], deaths: Mapping[int, str], silent: Sequence[int]
) -> RanksLost:
    """Name the first cause, once everyone was heard who would speak.

    A rank that vanished without a word is the likeliest; then one that reports an error of its own;
    then one that others wait for in vain. Of `silent` ranks nothing has come since the trouble
    began; one that others blame but that answers was merely slow.
    """
    ended = [rank for rank, state in enumerate(states) if state.ended or rank in deaths]
    for rank in ended:
        failure = states[rank].failure
        if failure is None or failure.stays:
            cause = f"{name_of(rank, states)} died ({deaths.get(rank, 'killed')})"
            return RanksLost(cause, rank, ended)
    for rank in ended:
        failure = states[rank].failure
        assert failure is not None
        # What a rank cannot load, or has no room for, its successor cannot either.
        final = failure.user_error or states[rank].loaded is None
        cause = f"{name_of(rank, states)} failed: {failure.message}"
        return RanksLost(cause, rank, ended, final=final)
    failures = [s.failure for s in states if s.failure is not None and not s.failure.aborted]
    for failure in failures:
        if failure.suspect >= 0:
            suspect = failure.suspect
            cause = f"{name_of(suspect, states)} did not answer ({failure.message})"
            return RanksLost(cause, suspect, [suspect] if suspect in silent else [])
    if failures:
        return RanksLost(f"the ranks lost each other ({failures[0].message})", None, silent)
    if silent:
        names = ", ".join(name_of(rank, states) for rank in silent)
        first = silent[0] if len(silent) == 1 else None
        return RanksLost(f"{names} stopped answering", first, silent)
    return RanksLost("the shard group stopped answering", None)
