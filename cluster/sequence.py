"""One sample of a request as the scheduler sees it, and the order in which samples are served."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from shards.contract import Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and committed tokens of one sample, and where its computation stands.

    `tokens` is the prompt and every committed generated token; the rank may be up to the number of
    plans in flight ahead of it. `max_length` is the number of tokens, prompt included, at which it
    ends for LENGTH. Only the scheduler writes what follows `want_logits`; all but `cached_tokens`,
    `started` and `finished` describe the current stay in a slot.

    One in `lockstep` is a hypothesis of a beam search: its next token is not the one that the rank
    sampled but comes from `Scheduler.fork`. Until then it is `resting`, as is one that no
    hypothesis was forked into yet: not planned, and it may lose its slot and blocks to one that
    waits.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    max_length: int
    sampling: Sampling
    priority: int = 0  # the higher goes first
    arrival: int = 0
    cache_salt: bytes = b""  # sequences share cached blocks only under the same salt
    leader: Sequence | None = None  # has the same prompt; this one waits to share its blocks
    lockstep: bool = False
    resting: bool = False
    want_logits: bool = False
    held: bool = False  # does not start until its caller says so
    slot: int | None = None  # None while waiting
    announced: bool = False  # the ranks know what is in the slot
    blocks: list[int] = field(default_factory=list)
    passed: int = 0  # leading blocks that no window reaches any more: given back, somebody else's
    planned: int = 0  # positions planned so far, those in flight included
    sealed: int = 0  # leading blocks that are registered with the pool
    inflight: int = 0  # plans not yet committed that contain it
    cached_tokens: int = 0  # found in the cache when it first started
    started: bool = False
    finished: bool = False

    @property
    def remaining(self) -> int:
        """How many positions can be planned now; 1 is a decode, 0 means that all are planned.

        Where every committed token is planned, the next input is the rank's own last sample, but
        for one in lockstep. The last token is never an input, so position `max_length - 1` is never
        computed.
        """
        if self.planned >= self.max_length - 1:
            return 0
        return max(0 if self.lockstep else 1, len(self.tokens) - self.planned)

    @property
    def request_order(self) -> tuple[int, int]:
        """Sort key of its request: higher priority, then earlier arrival."""
        return (-self.priority, self.arrival)


def service_order(sequence: Sequence) -> tuple[int, int, int]:
    """Sort key: higher priority, then earlier arrival, then lower sample index."""
    return (*sequence.request_order, sequence.index)


class SequenceQueue:
    """Sequences in service order. (priority, arrival, index) must be unique."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        return self._sequences[-1]

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=service_order)

    def remove(self, sequence: Sequence) -> None:
        at = bisect.bisect_left(self._sequences, service_order(sequence), key=service_order)
        removed = self._sequences.pop(at)
        assert removed is sequence, f"two sequences share {service_order(sequence)}"
