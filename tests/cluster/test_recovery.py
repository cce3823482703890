"""Ranks killed, stopped and broken in the middle of streams: the streams go on as if nothing was.

Ranks are processes, or threads where a fault has to be put inside one.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.errors import Abandoned, Unavailable
from cluster.rank_group import Launcher
from cluster.request import (
    BeamParams,
    Constraint,
    FinishReason,
    HealthState,
    Language,
    Request,
    SamplingParams,
    Stopping,
    TokenEvent,
    TokenStream,
)
from shards.errors import CollectiveTimeout, HeadwiseError
from shards.runner import Runner
from shards.worker import Worker
from tests.models import save, tiny_model
from tests.rank_processes import ProcessLauncher
from tests.ranks import ThreadLauncher
from tests.unit.tiny_tokenizers import byte_level

pytestmark = pytest.mark.timeout(300)

GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 512


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    byte_level().save_pretrained(path)
    model = tiny_model(
        "llama",
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=275,
        max_position_embeddings=CONTEXT,
    )
    return save(model, path)


def start(model_dir: Path, launcher: Launcher, world: int, **options: object) -> Driver:
    config = ClusterConfig.model_validate(
        {
            "model": str(model_dir),
            "tensor_parallel": world,
            "kv_memory": 1 << 20,
            "max_sequences": 12,
            "max_step_tokens": 48,
            "threads_per_rank": 1,
            "step_timeout_s": 30,
            "start_timeout_s": 120,
            "recoveries": 100,
            **options,
        }
    )
    driver = Driver(draw_up(config))
    driver.start(launcher)
    return driver


@contextmanager
def processes(
    model_dir: Path, world: int, listen: str | None = None, **options: object
) -> Iterator[tuple[Driver, ProcessLauncher]]:
    """Fails where a process that was ever started outlives the driver."""
    launcher = ProcessLauncher(world, listen)
    driver = start(model_dir, launcher, world, **options)
    try:
        yield driver, launcher
    finally:
        driver.stop()
    assert not [pid for pid in launcher.started if psutil.pid_exists(pid)]


def mixed_requests(name: str) -> list[Request]:
    prompt = tuple(range(40, 110))
    stopping = Stopping(max_tokens=60, ignore_eos=True)
    digits = Constraint(Language.REGEX, ("[0-9]*",))
    return [
        Request(f"{name}-greedy", prompt, GREEDY, stopping),
        Request(f"{name}-long", prompt * 4, SamplingParams(seed=1), stopping),
        Request(f"{name}-samples", (7, 8), SamplingParams(temperature=0.9, seed=2), stopping, n=2),
        Request(f"{name}-structured", (9,), SamplingParams(seed=3), stopping, constraint=digits),
        Request(
            f"{name}-logprobs",
            prompt,
            SamplingParams(seed=4, logprobs=2, prompt_logprobs=1, repetition_penalty=1.1),
            stopping,
        ),
        Request(
            f"{name}-stop", (11, 12), SamplingParams(seed=5), replace(stopping, token_ids=(13,))
        ),
        Request(f"{name}-beams", (21, 22, 23), GREEDY, stopping, n=2, beams=BeamParams(width=3)),
    ]


class Answer:
    """What a reader got."""

    __hash__ = None  # type: ignore[assignment] # it is compared, and grows

    def __init__(self, stream: TokenStream, on_event: Callable[[TokenEvent], None]) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: list[Any] = []
        self.prompts: list[Any] = []
        self.ends: dict[int, Any] = {}
        for event in stream:
            self.tokens.setdefault(event.index, []).extend(event.tokens)
            self.logprobs += event.logprobs
            if event.prompt_logprobs is not None:
                self.prompts.append(event.prompt_logprobs)
            if event.finish is not None:
                assert event.index not in self.ends
                self.ends[event.index] = (event.finish, event.stop_token, event.score)
            on_event(event)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))


def ask(
    driver: Driver, requests: list[Request], meanwhile: Callable[[Callable[[int], None]], None]
) -> list[Answer]:
    """All at once; `meanwhile` gets a function that waits until so many tokens have come."""
    changed, seen = threading.Condition(), 0

    def count(event: TokenEvent) -> None:
        nonlocal seen
        with changed:
            seen += len(event.tokens)
            changed.notify_all()

    def wait_for(tokens: int) -> None:
        with changed:
            assert changed.wait_for(lambda: seen >= tokens, 60)

    with ThreadPoolExecutor(len(requests)) as pool:
        streams = [driver.submit(request) for request in requests]
        answers = [pool.submit(Answer, stream, count) for stream in streams]
        meanwhile(wait_for)
        return [answer.result() for answer in answers]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.01)


def is_ready(driver: Driver) -> bool:
    return driver.health().state is HealthState.READY


def await_recovery(driver: Driver, epoch: int) -> None:
    until(lambda: is_ready(driver) and driver.health().epoch >= epoch, f"epoch {epoch}")


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[int, list[Answer]]:
    """By the number of ranks, undisturbed."""
    found = {}
    for world in (1, 2, 3):
        driver = start(model_dir, ThreadLauncher(world), world)
        found[world] = ask(driver, mixed_requests("calm"), lambda wait_for: None)
        driver.stop()
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("world", "listen"),
    [(1, None), (2, None), (3, None), (3, "127.0.0.1")],
    ids=["local", "two", "three", "gloo"],
)
def test_streams_go_on_when_ranks_are_killed(
    model_dir: Path, expected: dict[int, list[Answer]], world: int, listen: str | None
) -> None:
    """At moments that differ, in prefills and in decodes, the first rank and the last."""
    rng = random.Random(world)
    with processes(model_dir, world, listen) as (driver, launcher):
        epoch, files = driver.health().epoch, 0
        for turn, victim in enumerate((0, world - 1, 0, world - 1)):
            tokens = 0 if turn < 2 else rng.randrange(1, 200)

            def kill(wait_for: Callable[[int], None]) -> None:
                wait_for(tokens)  # noqa: B023 # called before the next turn
                launcher.signal(victim, signal.SIGKILL)  # noqa: B023

            assert ask(driver, mixed_requests(f"turn-{turn}"), kill) == expected[world]
            epoch += 1
            await_recovery(driver, epoch)
            health, load = driver.health(), driver.load()
            assert (health.epoch, health.cause) == (epoch, "")
            assert [rank.pid for rank in driver.ranks] == [launcher.pid(r) for r in range(world)]
            assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
            files = files or open_files()
            assert open_files() <= files
        assert len(launcher.started) == world + 4  # survivors kept their processes


@pytest.mark.parametrize("world", [1, 2])
def test_streams_go_on_when_a_rank_hangs(
    model_dir: Path, expected: dict[int, list[Answer]], world: int
) -> None:
    with processes(model_dir, world, step_timeout_s=3) as (driver, launcher):
        stopped = psutil.Process(launcher.pid(world - 1))

        def stop(wait_for: Callable[[int], None]) -> None:
            wait_for(20)
            launcher.signal(world - 1, signal.SIGSTOP)

        assert ask(driver, mixed_requests("hang"), stop) == expected[world]
        await_recovery(driver, 2)
        assert not stopped.is_running()


def test_two_ranks_at_once(model_dir: Path, expected: dict[int, list[Answer]]) -> None:
    with processes(model_dir, 3) as (driver, launcher):

        def kill(wait_for: Callable[[int], None]) -> None:
            wait_for(30)
            launcher.signal(0, signal.SIGKILL)
            launcher.signal(2, signal.SIGKILL)

        assert ask(driver, mixed_requests("two"), kill) == expected[3]
        await_recovery(driver, 2)
        assert len(launcher.started) == 5


def test_a_replacement_that_dies_is_replaced(
    model_dir: Path, expected: dict[int, list[Answer]]
) -> None:
    with processes(model_dir, 2) as (driver, launcher):

        def kill(wait_for: Callable[[int], None]) -> None:
            wait_for(30)
            launcher.signal(1, signal.SIGKILL)
            until(lambda: len(launcher.started) == 3, "the replacement")
            assert driver.health().state is HealthState.DEGRADED
            launcher.signal(1, signal.SIGKILL)  # while it loads
            until(lambda: len(launcher.started) == 4, "its replacement")
            launcher.signal(0, signal.SIGKILL)  # the survivor

        assert ask(driver, mixed_requests("again"), kill) == expected[2]
        await_recovery(driver, 2)
        assert len(launcher.started) == 5


def test_what_is_asked_during_the_outage(model_dir: Path) -> None:
    """Cancels, deadlines and new requests are heard while the group is rebuilt, and health says
    which rank is missing."""
    with processes(model_dir, 2) as (driver, launcher):
        endless = Stopping(max_tokens=400, ignore_eos=True)
        streams = {
            name: iter(driver.submit(Request(name, (5,), GREEDY, endless)))
            for name in ("aborted", "late")
        }
        for stream in streams.values():
            next(stream)
        launcher.signal(1, signal.SIGSTOP)  # nothing is computed from here on
        assert asyncio.run(driver.abort("aborted"))
        assert [e.finish for e in streams["aborted"] if e.finish] == [FinishReason.ABORTED]
        os.kill(launcher.pid(1), signal.SIGKILL)
        until(lambda: driver.health().state is HealthState.DEGRADED, "degraded")
        health = driver.health()
        assert health.cause.startswith("rank 1 (pid ")
        states = [rank.state for rank in health.ranks]
        assert states == [HealthState.DEGRADED, HealthState.STARTING]
        assert "rank 1" in health.ranks[0].cause
        soon = Request("soon", (5,), GREEDY, endless, deadline=time.monotonic())
        assert [e.finish for e in driver.submit(soon)] == [FinishReason.DEADLINE]
        new = driver.submit(Request("new", (6,), GREEDY, Stopping(max_tokens=4, ignore_eos=True)))
        assert sum(len(event.tokens) for event in new) == 4
        assert driver.health().epoch == 2
        assert asyncio.run(driver.abort("late"))
        assert [e.finish for e in streams["late"] if e.finish] == [FinishReason.ABORTED]


@pytest.mark.parametrize("recoveries", [0, 1])
def test_beyond_the_limit_the_group_is_lost(model_dir: Path, recoveries: int) -> None:
    with processes(model_dir, 2, recoveries=recoveries) as (driver, launcher):
        for turn in range(recoveries + 1):
            stream = iter(
                driver.submit(Request(f"r{turn}", (5,), GREEDY, Stopping(ignore_eos=True)))
            )
            next(stream)
            launcher.signal(1, signal.SIGKILL)
            if turn < recoveries:
                assert list(stream)[-1].finish is FinishReason.LENGTH
        with pytest.raises(Unavailable, match=r"rank 1 \(pid \d+, .*\) died"):
            list(stream)
        assert driver.health().state is HealthState.NOT_READY
        with pytest.raises(Unavailable, match="rank 1"):
            driver.submit(Request("after", (5,), GREEDY))


def break_rank(
    monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception, times: int, length: int = 0
) -> None:
    """The next `times` steps of `rank`, of those that start a sequence of `length`, raise."""
    execute, left = Runner.execute, times

    def broken(self: Runner, plan: Any) -> Any:
        nonlocal left
        meant = not length or any(start.prompt_length == length for start in plan.start)
        if left and meant and self._collective.rank == rank:
            left -= 1
            raise error
        return execute(self, plan)

    monkeypatch.setattr(Runner, "execute", broken)


def test_a_rank_that_fails_is_replaced(
    model_dir: Path, expected: dict[int, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(model_dir, ThreadLauncher(2), 2)

    def fail(wait_for: Callable[[int], None]) -> None:
        wait_for(20)
        break_rank(monkeypatch, 1, RuntimeError("the disk is on fire"), 1)

    try:
        assert ask(driver, mixed_requests("fail"), fail) == expected[2]
        await_recovery(driver, 2)
    finally:
        driver.stop()


def test_ranks_that_lose_each_other_keep_their_weights(
    model_dir: Path, expected: dict[int, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken connection alone, or a rank that was merely slow, costs no process."""
    loads, load = 0, Worker.load

    def counted(self: Worker) -> None:
        nonlocal loads
        loads += 1
        load(self)

    monkeypatch.setattr(Worker, "load", counted)
    driver = start(model_dir, ThreadLauncher(2), 2)

    def fail(wait_for: Callable[[int], None]) -> None:
        wait_for(20)
        break_rank(monkeypatch, 0, CollectiveTimeout("rank 1 did not arrive", 1), 1)

    try:
        assert ask(driver, mixed_requests("slow"), fail) == expected[2]
        await_recovery(driver, 2)
    finally:
        driver.stop()
    assert loads == 2


def test_a_request_that_takes_ranks_with_it_ends_alone(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(model_dir, ThreadLauncher(2), 2, recoveries=3)
    try:
        calm = Request("calm", (5,), GREEDY, Stopping(max_tokens=300, ignore_eos=True))
        expected = Answer(driver.submit(calm), lambda event: None)
        stream = driver.submit(replace(calm, id="bystander", priority=1))
        bystander = iter(stream)
        first = next(bystander)
        break_rank(monkeypatch, 1, RuntimeError("illegal instruction"), 100, length=3)
        with pytest.raises(Abandoned, match=r"request killer .*illegal instruction"):
            list(driver.submit(Request("killer", (1, 2, 3), GREEDY)))
        tokens = [token for event in (first, *bystander) for token in event.tokens]
        assert tokens == expected.tokens[0]
        await_recovery(driver, 3)
    finally:
        driver.stop()


def test_a_replacement_that_cannot_load_ends_the_group(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start(model_dir, ThreadLauncher(2), 2)
    try:
        stream = iter(driver.submit(Request("doomed", (5,), GREEDY, Stopping(ignore_eos=True))))
        next(stream)

        def no_weights(*arguments: object, **options: object) -> None:
            raise HeadwiseError("the weights are gone")

        monkeypatch.setattr("shards.worker.load_shard", no_weights)
        break_rank(monkeypatch, 1, RuntimeError("the disk is on fire"), 1)
        with pytest.raises(Unavailable, match=r"on fire.* and then: .*weights are gone"):
            list(stream)
        assert driver.health().state is HealthState.NOT_READY
    finally:
        driver.stop()


def test_a_replacement_that_takes_too_long_ends_the_group(model_dir: Path) -> None:
    with processes(model_dir, 2, start_timeout_s=8) as (driver, launcher):
        stream = iter(driver.submit(Request("doomed", (5,), GREEDY, Stopping(ignore_eos=True))))
        next(stream)
        launcher.signal(1, signal.SIGKILL)
        until(lambda: len(launcher.started) == 3, "the replacement")
        launcher.signal(1, signal.SIGSTOP)
        with pytest.raises(Unavailable, match=r"rank 1 .*died .* and then: rank 1 .*within 8 s"):
            list(stream)
