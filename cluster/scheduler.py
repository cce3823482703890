"""What the group computes in each step: continuous batching over a paged KV pool.

Each step has a budget of tokens. Running decodes take theirs first, then the chunks of running
prefills, then waiting sequences are admitted while budget, slots and blocks last. When a decode
finds no block, the sequence served last (lowest priority, latest arrival) is preempted: its blocks
are freed and it is computed again later from its tokens, which is exact because random numbers
depend on (seed, position) alone.

The hypotheses of a beam search are sequences in lockstep: each is planned up to its last token, and
rests until `fork` lets all of them go on together, sharing the blocks that they have in common.

A plan is made before the results of the plans in flight are known. Ranks execute plans in order, so
a block or slot that is given up may be given away in the very next plan, whatever is in flight.
"""

from __future__ import annotations

import struct

from cluster.blocks import BlockPool
from cluster.room import Room, forget_stay
from cluster.sequence import Sequence, SequenceQueue
from shards.contract import Sampled, SlotStart, SlotWork, StepPlan, StepResult

# Of a plan in flight, per slot: its sequence, and up to where its positions are computed then.
_Flight = dict[int, tuple[Sequence, int]]


class _Draft:
    """A plan being filled; `budget` is what is left of its tokens."""

    __slots__ = ("budget", "flight", "starts", "work")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.starts: list[SlotStart] = []
        self.work: list[SlotWork] = []
        self.flight: _Flight = {}

    def add(self, sequence: Sequence, blocks: list[int]) -> None:
        """Plan as much of `sequence` as the budget allows; `blocks` are new to its table."""
        assert sequence.slot is not None
        if not sequence.announced:
            sequence.announced = True
            tokens = struct.pack(f"<{len(sequence.tokens)}i", *sequence.tokens)
            self.starts.append(
                SlotStart(sequence.slot, tokens, sequence.prompt_length, sequence.sampling)
            )
            blocks = sequence.blocks
        start = sequence.planned
        count = min(self.budget, sequence.remaining)
        end = start + count
        sample = end >= len(sequence.tokens)
        logits = sample and sequence.want_logits
        self.work.append(SlotWork(sequence.slot, start, count, tuple(blocks), sample, logits))
        self.flight[sequence.slot] = (sequence, end)
        self.budget -= count
        sequence.planned = end
        sequence.inflight += 1


class Scheduler:
    """Decides what every step computes. Not thread-safe; holds no tensor.

    The caller sends every plan and hands every result to `commit` in the order of the plans, looks
    at the tokens that come back, and calls `remove` for each sequence that has ended. That includes
    those that reached `max_length`. `(priority, arrival, index)` must differ between sequences.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_step_tokens: int,
        window: int | None = None,
        whole_prompts: bool = False,
    ) -> None:
        """`window`: the largest of the layers' windows, None where a layer sees everything.
        `whole_prompts`: every prompt is computed in one step, never in chunks; none is longer than
        `max_step_tokens` then, and the pool caches no prefixes."""
        assert not (whole_prompts and pool.prefix_caching)
        self._pool = pool
        self._room = Room(pool, max_sequences, window)
        self._max_step_tokens = max_step_tokens
        self._whole_prompts = whole_prompts
        self._waiting = SequenceQueue()
        self._running = SequenceQueue()
        self._preemptions = 0
        self._cached_tokens = 0
        self._prompt_tokens = 0
        self.reset(epoch=0)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens to compute before every waiting sequence yields its next one, cache aside."""
        return sum(len(sequence.tokens) for sequence in self._waiting)

    @property
    def preemptions(self) -> int:
        return self._preemptions

    @property
    def cached_tokens(self) -> int:
        """Tokens found in the cache by sequences when they first started, in all."""
        return self._cached_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts of all sequences that have started."""
        return self._prompt_tokens

    def fits(self, length: int) -> bool:
        """Whether a sequence of `length` tokens in all can run, if need be alone."""
        return self._pool.blocks_for(length - 1) <= self._pool.blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `fits(max_length)` and has at least one token to generate."""
        assert self.fits(sequence.max_length)
        assert not self._whole_prompts or sequence.prompt_length <= self._max_step_tokens
        assert 0 < len(sequence.tokens) < sequence.max_length
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence in any state; idempotent. Its blocks are free at once, its slot ends with
        the next plan, and what is in flight for it will be dropped."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot is not None:
            self._leave(sequence)
        elif not sequence.resting:
            self._waiting.remove(sequence)

    def owner(self, result: StepResult, slot: int) -> Sequence | None:
        """The sequence that `slot` stood for in a result not yet committed; None if it has ended.

        For what a result carries besides tokens: prompt logprobs. A preempted sequence computes its
        prompt again, so those may come twice for the same positions.
        """
        if result.epoch != self._epoch:
            return None
        sequence, _ = self._flights[result.step][slot]
        return None if sequence.finished else sequence

    def in_flight(self) -> set[Sequence]:
        """What the plans compute whose results are not back."""
        return {
            sequence
            for flight in self._flights.values()
            for sequence, _ in flight.values()
            if not sequence.finished
        }

    def reset(self, epoch: int) -> None:
        """Begin an epoch: the ranks hold no KV and no slots, and nothing in flight will come back.

        What was running waits again, in its place in the order.
        """
        self._epoch = epoch
        self._flights: dict[int, _Flight] = {}
        self._room.clear()
        for sequence in self._running:
            forget_stay(sequence)
            if not sequence.resting:
                self._waiting.add(sequence)
        self._running = SequenceQueue()
        for sequence in self._waiting:
            sequence.inflight = 0

    def plan(self, step: int, epoch: int) -> StepPlan | None:
        """The next step, or None when nothing can be computed before a result or a request comes.

        Never more than `max_step_tokens` positions.
        """
        assert epoch == self._epoch or not self._flights, "reset() begins a new epoch"
        self._epoch = epoch
        draft = _Draft(self._max_step_tokens)
        self._plan_decodes(draft)
        self._plan_prefills(draft)
        self._admit(draft)
        if not draft.work:
            return None
        self._flights[step] = draft.flight
        return StepPlan(
            step,
            epoch,
            tuple(draft.work),
            tuple(draft.starts),
            self._room.take_ended(),
            self._room.take_copies(),
        )

    def commit(self, result: StepResult) -> list[tuple[Sequence, Sampled]]:
        """Take a step's result; returns the new token of each live sequence, already appended,
        but for one in lockstep, which rests from now on.

        A result of another epoch is dropped whole. A preempted sequence takes the token that was in
        flight, a removed one does not.
        """
        if result.epoch != self._epoch:
            return []
        flight = self._flights.pop(result.step)
        committed: list[tuple[Sequence, Sampled]] = []
        for sampled in result.sampled:
            sequence, _ = flight[sampled.slot]
            if sequence.finished:
                continue
            assert sampled.position == len(sequence.tokens)
            if sequence.lockstep:
                self._rest(sequence)
            else:
                sequence.tokens.append(sampled.token)
            committed.append((sequence, sampled))
        for sequence, end in flight.values():
            sequence.inflight -= 1
            # A sequence takes a slot only when nothing of an earlier stay is in flight, so what is
            # in a slot now is what computed these positions.
            if sequence.slot is not None:
                self._room.seal(sequence, end)
        return committed

    def fork(
        self, sequences: list[Sequence], children: list[tuple[Sequence, int]]
    ) -> list[Sequence]:
        """Let the hypotheses of a search, all of them resting, go on as `children`: each follows
        the tokens of one of `sequences`, with one more. Returns the sequence of each child.

        A parent goes on as its first child. Further children take over sequences that nothing
        follows, and the blocks of their parent: whole ones are shared, and the last one, where
        there is room in it, is copied. Without a slot or a block for that, they wait.
        """
        parents = {parent for parent, _ in children}
        spare = [sequence for sequence in sequences if sequence not in parents]
        for sequence in spare:
            if sequence.slot is not None:
                self._leave(sequence)
        heirs: list[Sequence] = []
        for parent, _ in children:
            if parent in parents:
                parents.remove(parent)
                heirs.append(parent)
            else:
                heirs.append(spare.pop(0))
                heirs[-1].tokens = list(parent.tokens)
                heirs[-1].started = True
                if self._room.branch(parent, heirs[-1]):
                    self._running.add(heirs[-1])
        # Only now: until here a parent's tokens are those that its other children follow.
        for heir, (_, token) in zip(heirs, children, strict=True):
            heir.tokens.append(token)
            heir.resting = False
            if heir.slot is None:
                self._waiting.add(heir)
            else:
                self._room.announce_again(heir)
        return heirs

    def _rest(self, sequence: Sequence) -> None:
        sequence.resting = True
        if sequence.slot is None:  # it was preempted while the result was on its way
            self._waiting.remove(sequence)

    def _plan_decodes(self, draft: _Draft) -> None:
        """Plan the running sequences that have one position to go."""
        for sequence in tuple(self._running):
            if not draft.budget:
                break
            # Victims are taken from the end, so one that lost its slot was not planned yet.
            if sequence.slot is None or sequence.remaining != 1:
                continue
            self._room.give_back_passed(sequence)
            blocks = self._block_for_decode(sequence)
            if blocks is not None:
                draft.add(sequence, blocks)

    def _block_for_decode(self, sequence: Sequence) -> list[int] | None:
        """The block that the next position needs, [] if none; None if `sequence` had to give way.

        The first in order never gives way: alone it fits.
        """
        if sequence.planned < len(sequence.blocks) * self._pool.block_size:
            return []
        while (blocks := self._pool.allocate(1)) is None:
            victim = self._running.last
            self._preempt(victim)
            if victim is sequence:
                return None
        sequence.blocks += blocks
        return blocks

    def _plan_prefills(self, draft: _Draft) -> None:
        """Plan the next chunk of running prefills; they got all their blocks when admitted."""
        for sequence in self._running:
            if not draft.budget:
                break
            if sequence.remaining > 1:
                self._room.give_back_passed(sequence)
                draft.add(sequence, [])

    def _admit(self, draft: _Draft) -> None:
        """Start waiting sequences, strictly in order: nobody overtakes one that finds no room."""
        for sequence in tuple(self._waiting):
            if not draft.budget:
                break
            if sequence.held or self._awaits_leader(sequence):
                continue
            if self._whole_prompts and sequence.prompt_length > draft.budget:
                break
            # Its tokens in flight, from before it was preempted, are part of what it starts with.
            if sequence.inflight or not self._find_room(sequence):
                break
            self._waiting.remove(sequence)
            self._running.add(sequence)
            self._room.enter(sequence)
            draft.add(sequence, [])

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether the blocks of its prompt are about to be computed by another sample of it."""
        leader = sequence.leader
        if leader is None or leader.finished or sequence.started or not self._pool.prefix_caching:
            return False
        return leader.sealed < (sequence.prompt_length - 1) // self._pool.block_size

    def _find_room(self, sequence: Sequence) -> bool:
        """Whether there are a slot and blocks for a waiting sequence, which it then has.

        Hypotheses that rest make room for others of their search, or it might never go on, and for
        requests that come before theirs, or two searches might wait for each other.
        """
        # One block per running sequence is left, so that a start does not at once preempt.
        while not (self._room.has_slot and self._room.allot(sequence, len(self._running))):
            resting = [other for other in self._running if other.resting]
            if not resting or resting[-1].request_order < sequence.request_order:
                return False
            self._preempt(resting[-1])
        if not sequence.started:
            sequence.started = True
            sequence.cached_tokens = sequence.planned
            self._cached_tokens += sequence.planned
            self._prompt_tokens += sequence.prompt_length
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._leave(sequence)
        if not sequence.resting:
            self._waiting.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._room.leave(sequence)
