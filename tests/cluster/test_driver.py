"""The driver over real sockets, real shared memory and the production worker, ranks on threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.errors import InvalidRequest, NoToken, Overloaded, StartupError, Unavailable
from cluster.request import (
    FinishReason,
    HealthState,
    Request,
    SamplingParams,
    Stopping,
    TokenEvent,
)
from shards.errors import HeadwiseError
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save(tiny_model("llama", num_attention_heads=9, num_key_value_heads=3), path)
    return path


def start(model_dir: Path, world: int = 2, **options: object) -> Driver:
    config = ClusterConfig.model_validate(
        {
            "model": str(model_dir),
            "tensor_parallel": world,
            "kv_memory": 1 << 20,
            "max_sequences": 4,
            "threads_per_rank": 1,
            "step_timeout_s": 20,
            **options,
        }
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(world))
    return driver


@pytest.fixture(scope="module")
def driver(model_dir: Path) -> Iterator[Driver]:
    driver = start(model_dir)
    yield driver
    driver.stop()


def request(name: str, prompt: list[int], max_tokens: int = 8, **changes: object) -> Request:
    base = Request(name, tuple(prompt), GREEDY, Stopping(max_tokens=max_tokens))
    return replace(base, **changes)  # type: ignore[arg-type]


def tokens_of(events: list[TokenEvent], index: int = 0) -> list[int]:
    return [token for event in events if event.index == index for token in event.tokens]


def idle(driver: Driver) -> None:
    """Wait, on the engine's own notes, until nothing runs."""
    deadline = time.monotonic() + 10
    while (load := driver.load()).running or load.waiting:
        done = threading.Event()
        driver.loop._post(done.set)
        assert done.wait(5)
        assert time.monotonic() < deadline, f"still busy: {load}"


def test_greedy_tokens_equal_transformers(driver: Driver, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = [5, 3, 9, 1]
    events = list(driver.submit(request("greedy", prompt, 12)))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert tokens_of(events) == expected[0, len(prompt) :].tolist()
    last = events[-1]
    assert last.finish is FinishReason.LENGTH
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 12)
    assert last.timing is not None
    assert 0 <= last.timing.queue <= last.timing.first_token <= last.timing.total


def test_many_at_once_equal_each_alone(driver: Driver) -> None:
    """More requests than slots, greedy and sampled, of different lengths."""
    requests = [
        request(
            f"many-{i}",
            [(7 * i + j) % 90 for j in range(1 + 5 * i)],
            4 + i,
            sampling=SamplingParams(temperature=0.0 if i % 2 else 1.0, top_p=0.9, seed=i),
        )
        for i in range(10)
    ]
    alone = [tokens_of(list(driver.submit(r))) for r in requests]
    together = [driver.submit(r) for r in requests]
    assert [tokens_of(list(stream)) for stream in together] == alone


def test_samples_of_a_request_differ_and_repeat_with_the_seed(driver: Driver) -> None:
    params = SamplingParams(seed=11)
    first = list(driver.submit(request("n-1", [1, 2], 16, sampling=params, n=3)))
    again = list(driver.submit(request("n-2", [1, 2], 16, sampling=params, n=3)))
    samples = [tokens_of(first, i) for i in range(3)]
    assert samples == [tokens_of(again, i) for i in range(3)]
    assert len({tuple(sample) for sample in samples}) == 3
    assert sum(event.finish is not None for event in first) == 3


def test_continuing_from_delivered_tokens_equals_the_whole(driver: Driver) -> None:
    params = SamplingParams(seed=5)
    whole = tokens_of(list(driver.submit(request("whole", [4, 2], 12, sampling=params))))
    rest = request("rest", [4, 2], 12, sampling=params, generated=tuple(whole[:5]))
    assert tokens_of(list(driver.submit(rest))) == whole[5:]


def test_stop_token_ends_the_sample_and_is_shown_on_request(driver: Driver) -> None:
    tokens = tokens_of(list(driver.submit(request("free", [8, 8], 12))))
    stop = tokens[5]
    until = tokens.index(stop)
    for include in (False, True):
        stopping = Stopping(max_tokens=12, token_ids=(stop,), include_stop=include)
        events = list(driver.submit(request(f"stop-{include}", [8, 8], stopping=stopping)))
        assert tokens_of(events) == tokens[: until + include]
        assert events[-1].finish is FinishReason.STOP
        assert events[-1].stop_token == stop


def test_min_tokens_puts_off_the_stop(driver: Driver) -> None:
    stop = tokens_of(list(driver.submit(request("probe", [8, 8], 1))))[0]
    stopping = Stopping(max_tokens=6, min_tokens=3, token_ids=(stop,))
    tokens = tokens_of(list(driver.submit(request("min", [8, 8], stopping=stopping))))
    assert len(tokens) >= 3
    assert stop not in tokens[:3]


def test_prompt_logprobs_are_those_of_the_model(driver: Driver, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = list(range(2, 40))
    params = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=0)
    events = list(driver.submit(request("echo", prompt, 1, sampling=params)))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = events[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    for position, entry in enumerate(found[1:], 1):
        assert entry is not None
        assert entry.token == prompt[position]
        row = expected[position - 1]
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert list(entry.top_tokens) == row.topk(2).indices.tolist()


def test_abort_and_close_free_the_cache(driver: Driver) -> None:
    aborted = driver.submit(request("aborted", [1], 200))
    closed = driver.submit(request("closed", [2], 200))
    iterator = iter(aborted)
    next(iterator)
    assert asyncio.run(driver.abort("aborted"))
    assert [e.finish for e in iterator if e.finish] == [FinishReason.ABORTED]
    closed.close()
    idle(driver)
    assert driver.load().kv_blocks_used == 0
    assert not asyncio.run(driver.abort("aborted"))


def test_deadline_ends_a_request(driver: Driver) -> None:
    events = list(driver.submit(request("late", [1], 200, deadline=time.monotonic())))
    assert events[-1].finish is FinishReason.DEADLINE


async def test_async_reader_and_slow_reader(driver: Driver) -> None:
    slow = driver.submit(request("slow", [3], 40))
    fast = [event async for event in driver.submit(request("fast", [3], 40))]
    await asyncio.to_thread(idle, driver)
    merged = [event async for event in slow]
    assert tokens_of(merged) == tokens_of(fast)
    assert len(merged) == 1  # all that waited came at once


def test_a_name_in_use_is_refused(driver: Driver) -> None:
    first = driver.submit(request("twice", [1], 100))
    with pytest.raises(InvalidRequest, match="twice"):
        driver.submit(request("twice", [1], 1))
    first.close()


@pytest.mark.parametrize("length", [0, 256, 300])
def test_a_prompt_without_room_for_a_token_is_refused(driver: Driver, length: int) -> None:
    """Also by those who skip validation: it must not reach the engine's thread."""
    with pytest.raises(InvalidRequest, match=f"{length} tokens"):
        driver.submit(Request("no-room", (1,) * length, GREEDY))
    assert len(tokens_of(list(driver.submit(request("next", [1] * 255, 1))))) == 1


def test_what_never_fits_the_cache_is_refused_at_once(model_dir: Path) -> None:
    driver = start(model_dir, world=1, kv_memory=64 << 10)
    try:
        room = driver.load().kv_blocks * driver.load().block_size
        with pytest.raises(InvalidRequest, match=f"{room}"):
            driver.submit(request("huge", [1] * room, 8))
        assert tokens_of(list(driver.submit(request("small", [1], 2))))
    finally:
        driver.stop()


def test_preempted_requests_give_the_same_tokens(model_dir: Path, driver: Driver) -> None:
    requests = [
        request(f"p{i}", [i + 1] * 20, 60, sampling=SamplingParams(seed=i)) for i in range(4)
    ]
    expected = [tokens_of(list(driver.submit(r))) for r in requests]
    small = start(model_dir, kv_memory=60 << 10)
    try:
        streams = [small.submit(r) for r in requests]
        assert [tokens_of(list(stream)) for stream in streams] == expected
        assert small.load().preemptions > 0
        assert small.load().kv_blocks_used == 0
    finally:
        small.stop()


def test_a_full_queue_says_when_to_come_back(model_dir: Path) -> None:
    driver = start(model_dir, world=1, max_sequences=1, max_queued_requests=1)
    try:
        streams = [driver.submit(request(f"q{i}", [1], 200)) for i in range(2)]
        with pytest.raises(Overloaded) as full:
            driver.submit(request("one-too-many", [1], 200))
        assert full.value.retry_after > 0
        for stream in streams:
            stream.close()
    finally:
        driver.stop()


def test_a_rank_that_fails_ends_streams_with_its_name(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.runner import Runner

    driver = start(model_dir, recoveries=0)
    stream = driver.submit(request("doomed", [1], 230))
    iterator = iter(stream)
    next(iterator)
    execute = Runner.execute

    def break_rank_1(self: Runner, plan: object) -> object:
        if self._collective.rank == 1:
            raise RuntimeError("the disk is on fire")
        return execute(self, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "execute", break_rank_1)
    with pytest.raises(Unavailable, match=r"rank 1 .*the disk is on fire"):
        list(iterator)
    health = driver.health()
    assert health.state is HealthState.NOT_READY
    assert "rank 1" in health.cause
    assert "disk" in health.ranks[1].cause
    with pytest.raises(Unavailable, match="rank 1"):
        driver.submit(request("after", [1]))
    driver.stop()


def test_logits_that_are_no_numbers_end_their_own_request_only(tmp_path: Path) -> None:
    """A token whose embedding is NaN: who has it in the prompt ends, and leaves nothing behind in
    the cache blocks that others take over."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = torch.nan
    save(model, tmp_path)
    driver = start(tmp_path, max_sequences=3, prefix_caching=False, kv_memory=40 << 10)
    try:
        good = [request(f"g{i}", [i + 1] * 5, 20) for i in range(2)]
        expected = [tokens_of(list(driver.submit(r))) for r in good]
        assert not any(100 in tokens for tokens in expected)
        streams = [driver.submit(r) for r in good]
        poisoned = driver.submit(request("bad", [3, 100, 3] * 8, 20, n=2))
        with pytest.raises(NoToken, match="position 24"):
            list(poisoned)
        assert [tokens_of(list(stream)) for stream in streams] == expected
        assert [tokens_of(list(driver.submit(r))) for r in good] == expected
        idle(driver)
        assert driver.load().kv_blocks_used == 0
    finally:
        driver.stop()


def test_a_deadline_years_away_is_just_a_deadline(driver: Driver) -> None:
    far = time.monotonic() + 10 * 365 * 86400
    first = list(driver.submit(request("far", [1], 3, deadline=far)))
    again = driver.submit(request("far-again", [1], 3, deadline=far))
    assert tokens_of(list(again)) == tokens_of(first)
    idle(driver)
    assert driver.health().state is HealthState.READY


def test_stop_ends_open_streams(model_dir: Path) -> None:
    driver = start(model_dir, world=1)
    stream = driver.submit(request("open", [1], 230))
    driver.stop()
    with pytest.raises(Unavailable, match="stopping"):
        list(stream)


def test_a_rank_that_cannot_load_is_a_startup_error(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*arguments: object, **options: object) -> None:
        raise HeadwiseError("the weights are gone")

    monkeypatch.setattr("shards.worker.load_shard", no_weights)
    with pytest.raises(StartupError, match=r"rank \d .*the weights are gone"):
        start(model_dir)
