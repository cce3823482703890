"""64 requests at a time, of all lengths and settings, in too small a cache: each as if alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.request import Request, SamplingParams, Stopping
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

CONTEXT = 3200
VOCABULARY = 131


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save(tiny_model("llama", max_position_embeddings=CONTEXT), path)
    return path


def start(model_dir: Path, world: int, **options: object) -> Driver:
    config = ClusterConfig.model_validate(
        {
            "model": str(model_dir),
            "tensor_parallel": world,
            "max_sequences": 24,
            "threads_per_rank": 1,
            **options,
        }
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(world))
    return driver


def mixed_requests() -> list[Request]:
    """Lengths from 1 to 3,000, mostly short; a third share a long beginning."""
    rng = random.Random(3)
    beginning = [rng.randrange(VOCABULARY) for _ in range(200)]
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2),
        SamplingParams(top_k=20, min_p=0.02, seed=3),
        SamplingParams(temperature=1.3, repetition_penalty=1.2, frequency_penalty=0.3, seed=4),
    ]
    requests = []
    for number in range(64):
        length = 3000 if number == 7 else int(3000 ** rng.random())
        prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
        if number % 3 == 0:
            prompt = beginning + prompt[:100]
        requests.append(
            Request(
                f"mixed-{number}",
                tuple(prompt),
                settings[number % len(settings)],
                Stopping(max_tokens=rng.randrange(1, 40)),
                n=1 + (number % 8 == 0),
            )
        )
    return requests


Answer = dict[int, tuple[int, ...]]


def answers(driver: Driver, requests: list[Request]) -> list[Answer]:
    """All at once."""
    found = []
    for stream in [driver.submit(request) for request in requests]:
        answer: Answer = {}
        for event in stream:
            answer[event.index] = answer.get(event.index, ()) + event.tokens
        found.append(answer)
    return found


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Iterator[list[Answer]]:
    """Each alone, nothing cached, room for all."""
    driver = start(model_dir, 1, prefix_caching=False)
    try:
        yield [answers(driver, [request])[0] for request in mixed_requests()]
    finally:
        driver.stop()


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_equals_its_solo_run(
    model_dir: Path, expected: list[Answer], world: int, prefix_caching: bool
) -> None:
    # Little more than the longest request needs alone.
    probe = draw_up(ClusterConfig(model=str(model_dir), tensor_parallel=world))
    memory = max(probe.block_bytes) * (CONTEXT // 16 + 8)
    driver = start(model_dir, world, prefix_caching=prefix_caching, kv_memory=memory)
    try:
        assert answers(driver, mixed_requests()) == expected
        load = driver.load()
        assert load.preemptions > 0
        assert (load.cached_tokens > 0) == prefix_caching
        assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    finally:
        driver.stop()


def test_samples_share_the_prompt_also_where_others_must_not(model_dir: Path) -> None:
    driver = start(model_dir, 1)
    try:
        prompt = tuple(range(100)) * 2
        private = Request("a", prompt, SamplingParams(seed=1), Stopping(max_tokens=4), n=4)
        private = replace(private, cache=False)
        first = answers(driver, [private])[0]
        assert driver.load().cached_tokens == 3 * 192  # whole blocks of the prompt, three times
        assert answers(driver, [replace(private, id="b")])[0] == first
        assert driver.load().cached_tokens == 6 * 192  # nothing from the other request
        salted = replace(private, id="c", cache=True, cache_salt="team", n=1)
        answers(driver, [salted])
        assert driver.load().cached_tokens == 6 * 192
        assert answers(driver, [replace(salted, id="d")])[0][0] == first[0]
        assert driver.load().cached_tokens == 7 * 192
    finally:
        driver.stop()
