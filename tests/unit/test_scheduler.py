"""The scheduler against a fake rank that executes plans exactly as the contract says."""

from __future__ import annotations

import functools
import struct
import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from cluster.beams import Beam, BeamSearch, Finished
from cluster.blocks import BlockPool
from cluster.request import BeamParams
from cluster.scheduler import Scheduler
from cluster.sequence import Sequence, service_order
from shards.contract import Logprobs, Sampled, Sampling, SlotStart, SlotWork, StepPlan, StepResult

BLOCK = 4


def next_hash(previous: int, token: int) -> int:
    """What the fake model computes at a position: a function of all tokens up to it."""
    return zlib.crc32(struct.pack("<i", token), previous)


def alone(prompt: list[int], max_length: int, stop: int | None = None) -> list[int]:
    """Prompt and generated tokens of a sequence that runs by itself; `stop` is its last token."""
    tokens, state = list(prompt), 0
    for token in prompt:
        state = next_hash(state, token)
    while len(tokens) < max_length and (len(tokens) == len(prompt) or tokens[-1] != stop):
        tokens.append(state % 5)
        state = next_hash(state, tokens[-1])
    return tokens


Candidates = list[tuple[int, float]]


def candidates(state: int) -> Candidates:
    """What the fake model thinks of tokens 0 to 4 where it has computed `state`."""
    return [(token, -1.0 - next_hash(state, token) % 1000 / 1000) for token in range(5)]


@dataclass
class Slot:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    next: int | None = None  # the position to be computed next


class FakeRank:
    """Token buffers, block tables and a KV memory that shows any position read or written wrong."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.size = block_size
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(blocks)]
        self.slots: dict[int, Slot] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.end:
            del self.slots[slot]
        copied = [list(self.kv[source]) for source, _ in plan.copy]
        for (_, target), block in zip(plan.copy, copied, strict=True):
            self.kv[target] = block
        for start in plan.start:
            assert start.slot not in self.slots
            self.slots[start.slot] = Slot(
                list(struct.unpack(f"<{len(start.tokens) // 4}i", start.tokens))
            )
        assert len({work.slot for work in plan.work}) == len(plan.work)
        assert {start.slot for start in plan.start} <= {work.slot for work in plan.work}
        sampled = [self._compute(work) for work in plan.work]
        return StepResult(plan.step, plan.epoch, tuple(s for s in sampled if s is not None))

    def _compute(self, work: SlotWork) -> Sampled | None:
        slot = self.slots[work.slot]
        slot.blocks += work.blocks
        assert len(set(slot.blocks)) == len(slot.blocks)
        if slot.next is None:
            slot.next = work.start  # all before it is checked below, wherever it came from
        assert work.start == slot.next
        assert work.count > 0
        slot.next += work.count
        assert slot.next <= len(slot.tokens), "a token is computed before it is known"
        assert work.sample == (slot.next == len(slot.tokens))
        state = 0
        for position in range(slot.next):
            state = next_hash(state, slot.tokens[position])
            block, offset = slot.blocks[position // self.size], position % self.size
            if position >= work.start:
                holders = [other for other in self.slots.values() if block in other.blocks]
                assert holders == [slot], f"block {block} is written by one of two holders"
                self.kv[block][offset] = state
            assert self.kv[block][offset] == state, f"position {position} reads another's KV"
        if not work.sample:
            return None
        slot.tokens.append(state % 5)
        likeliest = tuple(zip(*candidates(state), strict=True))
        return Sampled(
            work.slot,
            len(slot.tokens) - 1,
            slot.tokens[-1],
            Logprobs(slot.tokens[-1], 0.0, 1, *likeliest),
        )


def sequence(
    prompt: list[int], new_tokens: int = 4, *, arrival: int = 0, priority: int = 0, **more: object
) -> Sequence:
    return Sequence(
        f"request-{arrival}",
        0,
        list(prompt),
        len(prompt),
        len(prompt) + new_tokens,
        priority=priority,
        arrival=arrival,
        **{"sampling": Sampling(), **more},  # type: ignore[arg-type]
    )


class Searching(Beam):
    """A beam search with what a driver knows of it."""

    def __init__(self, like: Sequence, params: BeamParams, stop: int | None = None) -> None:
        """Takes the place of the sequence `like`; hypotheses end at `stop`."""
        self.prompt = list(like.tokens)
        self._new_search = functools.partial(
            BeamSearch,
            params,
            () if stop is None else (stop,),
            max_tokens=like.max_length - like.prompt_length,
        )
        sequences = [
            replace(like, index=i, tokens=list(like.tokens), lockstep=True, resting=i > 0)
            for i in range(params.width)
        ]
        super().__init__(self._new_search(), sequences)

    @property
    def expected(self) -> tuple[Finished, ...]:
        """What a search finds that runs by itself."""
        search, live = self._new_search(), [self.prompt]
        while not search.over:
            states = [functools.reduce(next_hash, tokens, 0) for tokens in live]
            children = search.advance([candidates(state) for state in states])
            live = [[*live[child.parent], child.token] for child in children]
        return search.finished


class Loop:
    """A driver's loop: sends plans to a fake rank, keeps up to `depth` in flight, and stops."""

    def __init__(
        self,
        blocks: int = 16,
        *,
        block_size: int = BLOCK,
        max_sequences: int = 4,
        max_step_tokens: int = 16,
        depth: int = 1,
        prefix_caching: bool = True,
        whole_prompts: bool = False,
    ) -> None:
        self.pool = BlockPool(blocks, block_size, prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            whole_prompts=whole_prompts,
        )
        self.budget, self.depth = max_step_tokens, depth
        self.rank = FakeRank(blocks, block_size)
        self.results: deque[StepResult] = deque()
        self.live: list[Sequence] = []
        self.stops: dict[Sequence, int | None] = {}
        self.beams: dict[Sequence, Beam] = {}
        self.steps = self.epoch = 0

    def add(self, *sequences: Sequence, stop: int | None = None) -> None:
        for item in sequences:
            self.scheduler.add(item)
            self.live.append(item)
            self.stops[item] = stop

    def search(self, beam: Beam) -> None:
        self.scheduler.add(beam.sequences[0])
        self.live += beam.sequences
        self.beams |= dict.fromkeys(beam.sequences, beam)

    def remove(self, item: Sequence) -> None:
        self.scheduler.remove(item)
        self.live.remove(item)

    def end(self, beam: Beam) -> None:
        for item in beam.sequences:
            self.remove(item)

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.steps, self.epoch)
        if plan is None:
            return None
        self.steps += 1
        assert 0 < sum(work.count for work in plan.work) <= self.budget
        self.results.append(self.rank.execute(plan))
        self.check_nobody_overtakes(plan)
        return plan

    def check_nobody_overtakes(self, plan: StepPlan) -> None:
        waiting = [
            service_order(item) for item in self.live if item.slot is None and not item.resting
        ]
        for start in plan.start:
            started = next(item for item in self.live if item.slot == start.slot)
            forked = started.lockstep and len(started.tokens) > started.prompt_length
            assert forked or all(service_order(started) < order for order in waiting)

    def commit(self) -> None:
        for item, sampled in self.scheduler.commit(self.results.popleft()):
            if item.lockstep:
                self.go_on(self.beams[item], item, sampled)
                continue
            assert item.tokens[-1] == sampled.token
            if len(item.tokens) == item.max_length or sampled.token == self.stops[item]:
                self.remove(item)

    def go_on(self, beam: Beam, item: Sequence, sampled: Sampled) -> None:
        assert sampled.logprobs is not None
        children = beam.take(item, sampled.logprobs)
        if beam.search.over:
            self.end(beam)
        elif children:
            beam.live = self.scheduler.fork(beam.sequences, children)

    def turn(self) -> bool:
        """One plan or one commit; False when there is nothing left to do."""
        if len(self.results) < self.depth and self.plan() is not None:
            return True
        if not self.results:
            return False
        self.commit()
        return True

    def run(self) -> None:
        for _ in range(5000):
            if not self.turn():
                break
        assert not self.live, "the loop is stuck"
        assert (self.scheduler.running, self.scheduler.waiting, self.pool.used) == (0, 0, 0)

    def lose_rank(self) -> None:
        self.epoch += 1
        self.rank = FakeRank(self.pool.blocks, self.pool.block_size)
        self.scheduler.reset(self.epoch)


def random_sequence(random: Random, arrival: int) -> Sequence:
    # Cut from one of two texts, so that prefixes are often shared.
    prompt = [random.randrange(2)] * random.randint(1, 14) + [2] * random.randint(0, 2)
    return sequence(
        prompt,
        random.randint(1, 12),
        arrival=arrival,
        priority=random.randrange(2),
        cache_salt=random.choice([b"", b"", b"other"]),
        sampling=Sampling(prompt_logprobs=random.choice([-1, -1, -1, 0])),
    )


def random_search(random: Random, like: Sequence) -> Searching:
    params = BeamParams(
        random.randint(2, 4), random.choice([0.5, 1.0, 2.0]), early_stopping=random.random() < 0.5
    )
    return Searching(like, params, stop=random.choice([None, 1, 2]))


@pytest.mark.parametrize("seed", range(40))
def test_whole_prompts_are_never_cut(seed: int) -> None:
    """Not beside decodes that leave little of the budget, nor when computed again."""
    random = Random(seed)
    loop = Loop(
        blocks=random.randint(14, 20),
        block_size=2,
        max_step_tokens=16,
        depth=random.randint(1, 3),
        prefix_caching=False,
        whole_prompts=True,
    )
    sequences = [random_sequence(random, arrival) for arrival in range(8)]
    loop.add(*sequences)
    started = dict[int, int]()  # slot -> its prompt's length
    for _ in range(5000):
        if len(loop.results) < loop.depth and (plan := loop.plan()) is not None:
            started |= {start.slot: start.prompt_length for start in plan.start}
            for work in plan.work:
                prompt = started[work.slot]
                assert work.start >= prompt or (work.start == 0 and work.count >= prompt)
        elif loop.results:
            loop.commit()
    assert not loop.live


@pytest.mark.parametrize("seed", range(250))
def test_every_sequence_gets_the_tokens_it_would_get_alone(seed: int) -> None:
    """Random arrivals, removals and lost ranks, over pools that are mostly too small."""
    random = Random(seed)
    loop = Loop(
        blocks=random.randint(6, 20),
        block_size=random.randint(1, 4),
        max_sequences=random.randint(1, 5),
        max_step_tokens=random.choice([1, 3, 8, 20]),
        depth=random.randint(1, 3),
        prefix_caching=random.random() < 0.7,
    )
    removed = set()
    searches: list[Searching] = []
    for turn in range(60):
        if turn < 40 and random.random() < 0.3:
            item = random_sequence(random, turn)
            fits = loop.scheduler.fits(item.max_length)
            if fits and random.random() < 0.7:
                loop.add(item, stop=random.choice([None, None, 2]))
            elif fits:
                searches.append(random_search(random, item))
                loop.search(searches[-1])
        if random.random() < 0.02:
            loop.lose_rank()
        if loop.live and random.random() < 0.04:
            item = random.choice(loop.live)
            removed.add(item)
            if item in loop.beams:
                loop.end(loop.beams[item])
            else:
                loop.remove(item)
        loop.turn()
    loop.run()
    for item, stop in loop.stops.items():
        expected = alone(item.tokens[: item.prompt_length], item.max_length, stop)
        if item in removed:
            assert item.tokens == expected[: len(item.tokens)]
        else:
            assert item.tokens == expected
    for found in searches:
        if removed.isdisjoint(found.sequences):
            assert found.search.finished == found.expected


def test_a_sequence_preempted_before_its_first_token_came_back() -> None:
    loop = Loop(blocks=4, block_size=1, depth=3)
    first, second = (sequence([i], 3, arrival=i) for i in range(2))
    loop.add(first, second)
    plans = [loop.plan() for _ in range(3)]
    assert [len(plan.work) for plan in plans if plan] == [2, 2, 1]
    assert (second.slot, second.tokens) == (None, [1])
    loop.run()
    assert second.tokens == alone([1], 4)


def test_a_start_leaves_a_block_for_every_running_sequence() -> None:
    loop = Loop(blocks=4, prefix_caching=False)
    running, waiting = (sequence([i] * 5, 2, arrival=i) for i in range(2))
    loop.add(running, waiting)
    loop.plan()
    assert (running.slot, waiting.slot) == (0, None)
    assert loop.pool.used == 2
    loop.run()


def test_one_that_finds_no_room_keeps_no_cached_blocks() -> None:
    loop = Loop(blocks=5)
    first, second = sequence([1] * 12, 4), sequence([1] * 16, 1, arrival=1)
    loop.add(first)
    loop.turn()
    loop.turn()
    loop.add(second)
    loop.plan()
    assert second.slot is None
    loop.remove(first)
    assert loop.pool.used == 0


def test_prefill_is_cut_to_the_budget_and_samples_once() -> None:
    loop = Loop(max_step_tokens=5)
    loop.add(sequence([1] * 12, 2))
    works = [plan.work[0] for _ in range(4) if (plan := loop.plan())]
    assert [(w.start, w.count, w.sample) for w in works] == [
        (0, 5, False), (5, 5, False), (10, 2, True), (12, 1, True)
    ]  # fmt: skip
    assert [len(w.blocks) for w in works] == [3, 0, 0, 1]


def test_decodes_go_before_prefills_and_prefills_share_the_rest_in_order() -> None:
    loop = Loop(max_step_tokens=8)
    decoding, first, second = (sequence([i] * 6, arrival=i) for i in range(3))
    loop.add(decoding)
    loop.plan()
    loop.add(first, second)
    plan = loop.plan()
    assert plan is not None
    assert [(w.slot, w.count) for w in plan.work] == [
        (decoding.slot, 1), (first.slot, 6), (second.slot, 1)
    ]  # fmt: skip
    plan = loop.plan()
    assert plan is not None
    assert [(w.slot, w.count) for w in plan.work] == [
        (decoding.slot, 1), (first.slot, 1), (second.slot, 5)
    ]  # fmt: skip


def test_decodes_run_ahead_of_results_but_never_past_the_end() -> None:
    loop = Loop()
    item = sequence([1, 2, 3], 3)
    loop.add(item)
    plans = [loop.plan() for _ in range(4)]
    assert [p.work[0].start if p else None for p in plans] == [0, 3, 4, None]
    assert item.inflight == 3
    while loop.results:
        loop.commit()
    assert item.finished
    assert item.tokens == alone([1, 2, 3], 6)


def test_higher_priority_starts_first_then_the_earlier() -> None:
    loop = Loop(max_sequences=2)
    items = [sequence([i], 1, arrival=i, priority=p) for i, p in enumerate([0, 1, 1, 0])]
    loop.add(*items)
    loop.plan()
    assert [item.slot is not None for item in items] == [False, True, True, False]
    loop.commit()
    loop.plan()
    assert [item.slot is not None for item in items] == [True, False, False, True]


def test_nobody_overtakes_one_that_finds_no_room() -> None:
    loop = Loop(blocks=4)
    running, large, small = (sequence([i] * n, 2, arrival=i) for i, n in enumerate([8, 12, 1]))
    loop.add(running)
    loop.plan()
    loop.add(large, small)
    loop.plan()
    assert (large.slot, small.slot) == (None, None)
    assert loop.scheduler.waiting_tokens == 13
    loop.run()


def test_the_latest_of_the_lowest_priority_is_preempted_and_goes_on_where_it_was() -> None:
    loop = Loop(blocks=7, prefix_caching=False)
    high = sequence([1] * 4, 12, arrival=2, priority=1)
    early = sequence([2] * 4, 12, arrival=0)
    late = sequence([3] * 4, 12, arrival=1)
    loop.add(early, late, high)
    while not loop.scheduler.preemptions:
        assert loop.turn()
    assert (high.slot, early.slot, late.slot) == (0, 1, None)
    assert 4 < len(late.tokens) < 16
    loop.run()
    for item in (high, early, late):
        assert item.tokens == alone(item.tokens[:4], 16)


def test_a_preempted_sequence_takes_its_token_in_flight_before_it_starts_again() -> None:
    loop = Loop(blocks=4, depth=2, prefix_caching=False)
    first, second = (sequence([i] * 4, 8, arrival=i) for i in range(2))
    loop.add(first, second)
    while not loop.scheduler.preemptions:
        assert loop.turn()
    assert second.slot is None
    assert second.inflight == 1
    before = len(second.tokens)
    loop.remove(first)
    assert loop.plan() is None, "there is room, but a token is in flight"
    loop.commit()
    assert len(second.tokens) == before + 1
    plan = loop.plan()
    assert plan is not None
    assert plan.start == (
        SlotStart(
            second.slot or 0, struct.pack(f"<{len(second.tokens)}i", *second.tokens), 4, Sampling()
        ),
    )


def test_a_removed_sequence_frees_its_blocks_at_once_and_its_slot_with_the_next_plan() -> None:
    loop = Loop(max_sequences=1)
    gone, next_one = (sequence([i] * 5, arrival=i) for i in range(2))
    loop.add(gone, next_one)
    loop.plan()
    assert loop.pool.used == 2
    loop.remove(gone)
    loop.scheduler.remove(gone)
    assert loop.pool.used == 0
    plan = loop.plan()
    assert plan is not None
    assert (plan.end, plan.start[0].slot) == ((0,), 0)
    assert loop.scheduler.owner(loop.results[0], 0) is None
    assert loop.scheduler.owner(loop.results[1], 0) is next_one
    loop.commit()
    assert gone.tokens == [0] * 5
    loop.run()


def test_a_waiting_sequence_can_be_removed() -> None:
    loop = Loop()
    items = [sequence([1], arrival=i) for i in range(3)]
    loop.add(*items)
    loop.remove(items[1])
    assert loop.scheduler.waiting == 2
    loop.run()
    assert items[1].tokens == [1]


def test_a_prefix_computed_once_is_shared() -> None:
    loop = Loop()
    first, second = (sequence([1] * 10, arrival=i) for i in range(2))
    loop.add(first)
    loop.turn()
    loop.turn()
    loop.add(second)
    plan = loop.plan()
    assert plan is not None
    work = next(w for w in plan.work if w.slot == second.slot)
    assert (work.start, work.count, work.blocks[:2]) == (8, 2, tuple(first.blocks[:2]))
    assert second.cached_tokens == loop.scheduler.cached_tokens == 8
    loop.run()
    assert second.tokens == alone([1] * 10, 14)


def test_prompt_logprobs_need_the_prompt_computed() -> None:
    loop = Loop()
    loop.add(sequence([1] * 10))
    loop.run()
    again = sequence([1] * 10, arrival=1, sampling=Sampling(prompt_logprobs=0))
    loop.add(again)
    loop.run()
    assert again.cached_tokens == loop.scheduler.cached_tokens == 0


def test_logits_are_asked_for_where_a_token_is_sampled() -> None:
    loop = Loop(max_step_tokens=4)
    loop.add(sequence([1] * 6, want_logits=True))
    plans = [loop.plan() for _ in range(3)]
    assert [plan.work[0].logits for plan in plans if plan] == [False, True, True]


def test_a_new_epoch_starts_everything_again_and_drops_late_results() -> None:
    loop = Loop(depth=2)
    item = sequence([1] * 6, 6)
    loop.add(item)
    for _ in range(4):
        loop.turn()
    late = list(loop.results)
    tokens = list(item.tokens)
    loop.lose_rank()
    assert late
    for result in late:
        assert loop.scheduler.commit(result) == []
        assert loop.scheduler.owner(result, 0) is None
    assert item.tokens == tokens
    loop.results.clear()
    plan = loop.plan()
    assert plan is not None
    assert (plan.epoch, plan.end) == (1, ())
    assert (plan.work[0].start, plan.work[0].count) == (0, len(tokens))
    loop.run()
    assert item.tokens == alone([1] * 6, 12)


def test_fits_says_what_can_run_alone() -> None:
    scheduler = Loop(blocks=3).scheduler
    assert scheduler.fits(13), "the last token's position is never computed"
    assert not scheduler.fits(14)


def test_a_sequence_that_just_fits_runs_alone() -> None:
    loop = Loop(blocks=3)
    item = sequence([1] * 3, 10)
    loop.add(item)
    loop.run()
    assert item.tokens == alone([1] * 3, 13)
    assert loop.scheduler.preemptions == 0


def test_an_idle_scheduler_plans_nothing() -> None:
    loop = Loop()
    assert loop.plan() is None
    loop.add(sequence([1], 1))
    assert (loop.scheduler.waiting, loop.scheduler.running) == (1, 0)
    loop.plan()
    assert (loop.scheduler.waiting, loop.scheduler.running) == (0, 1)
    assert loop.plan() is None
    loop.run()


def searching(
    prompt: list[int], new_tokens: int = 5, *, width: int = 2, arrival: int = 0
) -> Searching:
    return Searching(sequence(prompt, new_tokens, arrival=arrival), BeamParams(width))


def test_hypotheses_share_whole_blocks_and_copy_the_one_they_write_to() -> None:
    loop = Loop()
    found = searching([1] * 6, width=3)
    loop.search(found)
    loop.turn()
    assert loop.plan() is None, "it is not planned ahead of what follows it"
    loop.commit()
    first, second, third = found.live
    assert first.blocks[0] == second.blocks[0] == third.blocks[0]
    own = [item.blocks[1] for item in found.live]
    assert len(set(own)) == 3
    plan = loop.plan()
    assert plan is not None
    assert plan.copy == ((own[0], own[1]), (own[0], own[2]))
    assert plan.end == (0,), "what is in the slot of the first one changes too"
    assert {start.slot for start in plan.start} == {0, 1, 2}
    assert [(work.start, work.count, work.blocks) for work in plan.work] == [
        (6, 1, tuple(item.blocks)) for item in found.live
    ]
    loop.run()
    assert found.search.finished == found.expected


def test_at_the_end_of_a_block_there_is_nothing_to_copy() -> None:
    loop = Loop()
    found = searching([1] * 8)
    loop.search(found)
    loop.turn()
    loop.commit()
    plan = loop.plan()
    assert plan is not None
    assert plan.copy == ()
    assert found.live[0].blocks[:2] == found.live[1].blocks[:2]
    loop.run()
    assert found.search.finished == found.expected


@pytest.mark.parametrize(("blocks", "slots"), [(4, 4), (16, 1)], ids=["blocks", "slots"])
def test_hypotheses_run_in_turn_where_there_is_room_for_one(blocks: int, slots: int) -> None:
    loop = Loop(blocks, max_sequences=slots, prefix_caching=False)
    first, second = (searching([i] * 7, 9, width=3, arrival=i) for i in range(2))
    loop.search(first)
    loop.search(second)
    loop.run()
    assert loop.scheduler.preemptions
    assert first.search.finished == first.expected
    assert second.search.finished == second.expected


def test_a_search_ends_whatever_its_hypotheses_do() -> None:
    for turns in range(12):
        loop = Loop(5, depth=2, prefix_caching=False)
        found = searching([1] * 6, 9, width=4)
        loop.search(found)
        for _ in range(turns):
            loop.turn()
        loop.end(found)
        loop.run()


def test_a_resting_hypothesis_makes_no_room_for_a_later_request() -> None:
    loop = Loop(max_sequences=2, max_step_tokens=1)
    found, later = searching([1]), sequence([2], arrival=1)
    loop.search(found)
    loop.add(later)
    loop.plan()
    loop.commit()
    loop.plan()
    loop.plan()
    loop.commit()
    assert [item.resting for item in found.live] == [True, False]
    assert loop.plan() is None
    assert later.slot is None
    loop.run()
    assert loop.scheduler.preemptions == 0
    assert found.search.finished == found.expected
