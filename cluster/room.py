"""Where sequences stay while they run: a slot on the ranks, and blocks of the KV pool."""

from __future__ import annotations

from collections import deque

from cluster.blocks import BlockPool
from cluster.sequence import Sequence


class Room:
    """Slots and blocks, given to sequences and taken back; what the next plan must say of it.

    Ranks execute plans in order, so what one sequence gives back may go to another in the very next
    plan, whatever is in flight. `window`: the largest of the layers' windows, None where a layer
    sees everything.
    """

    def __init__(self, pool: BlockPool, slots: int, window: int | None) -> None:
        self.pool = pool
        self._slots = slots
        self._window = window
        self.clear()

    def clear(self) -> None:
        """The ranks hold nothing any more."""
        self.pool.clear()
        self._free_slots = deque(range(self._slots))
        self._ended: list[int] = []
        self._copies: dict[int, int] = {}  # target block -> source

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    def take_ended(self) -> tuple[int, ...]:
        """The slots that the next plan must end."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (source, target) blocks that the next plan must copy."""
        copies = tuple((source, target) for target, source in self._copies.items())
        self._copies = {}
        return copies

    def enter(self, sequence: Sequence) -> None:
        """Give a slot to a sequence that has blocks."""
        sequence.slot = self._free_slots.popleft()

    def leave(self, sequence: Sequence) -> None:
        """Take back slot and blocks."""
        assert sequence.slot is not None
        self.pool.free(sequence.blocks[sequence.passed :])
        if sequence.announced:
            self._ended.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        forget_stay(sequence)

    def announce_again(self, sequence: Sequence) -> None:
        """The ranks must be told anew what is in the sequence's slot."""
        if sequence.announced:
            assert sequence.slot is not None
            self._ended.append(sequence.slot)
            sequence.announced = False

    def allot(self, sequence: Sequence, spare: int) -> bool:
        """Give a waiting sequence blocks for all its tokens, cached ones first, or change nothing.

        `spare` blocks must be left, so that a start does not at once preempt.
        """
        tokens, pool = sequence.tokens, self.pool
        # Prompt logprobs come from computing the prompt.
        cacheable = sequence.sampling.prompt_logprobs < 0
        cached = pool.match(tokens, sequence.cache_salt) if cacheable else []
        missing = pool.blocks_for(len(tokens)) - len(cached)
        pool.share(cached)
        fresh = pool.allocate(missing) if pool.free_blocks >= missing + spare else None
        if fresh is None:
            pool.free(cached)
            return False
        sequence.blocks = cached + fresh
        sequence.sealed = len(cached)
        sequence.planned = len(cached) * pool.block_size
        return True

    def branch(self, parent: Sequence, heir: Sequence) -> bool:
        """Give `heir` a slot and what `parent` has computed: whole blocks shared, the last one
        copied. False, and nothing changed, where there is no room for that."""
        if parent.slot is None or not self._free_slots:
            return False
        whole = parent.planned // self.pool.block_size
        shared, written = parent.blocks[parent.passed : whole], parent.blocks[whole:]
        copies = self.pool.allocate(len(written))
        if copies is None:
            return False
        self.pool.share(shared)
        self._copies.update(zip(copies, written, strict=True))
        heir.blocks = parent.blocks[:whole] + copies
        heir.passed = parent.passed
        heir.planned, heir.sealed = parent.planned, parent.sealed
        self.enter(heir)
        return True

    def give_back_passed(self, sequence: Sequence) -> None:
        """Free the blocks that no window reaches from the next position on."""
        if self._window is None:
            return
        reached = max(0, sequence.planned + 1 - self._window) // self.pool.block_size
        reached = min(reached, len(sequence.blocks))
        if reached > sequence.passed:
            self.pool.free(sequence.blocks[sequence.passed : reached])
            sequence.passed = reached

    def seal(self, sequence: Sequence, computed: int) -> None:
        """Register the blocks that lie wholly in the first `computed` positions."""
        size, blocks = self.pool.block_size, sequence.blocks
        for i in range(sequence.sealed, computed // size):
            if i <= sequence.passed and sequence.passed:
                return  # what it would be chained to is somebody else's
            parent = blocks[i - 1] if i else None
            tokens = sequence.tokens[i * size : (i + 1) * size]
            self.pool.seal(blocks[i], tokens, parent, sequence.cache_salt)
        sequence.sealed = max(sequence.sealed, computed // size)


def forget_stay(sequence: Sequence) -> None:
    """The sequence has no slot and no blocks."""
    sequence.slot = None
    sequence.announced = False
    sequence.blocks = []
    sequence.passed = 0
    sequence.planned = 0
    sequence.sealed = 0
