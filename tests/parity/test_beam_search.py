"""Beam search equals `transformers`: the same hypotheses in the same order with the same scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from cluster.beams import BeamSearch
from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.request import (
    BeamParams,
    FinishReason,
    Request,
    SamplingParams,
    Stopping,
    TokenEvent,
)
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

STEPS = 20
# Both sides add up some 20 log probabilities of order 1 in float32, which differ by about 1e-6.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend their time on threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    beams: BeamParams
    ends: tuple[int, ...] = ()
    max_tokens: int = STEPS
    min_tokens: int = 0

    def request(self, request_id: str, n: int) -> Request:
        return Request(
            request_id,
            self.prompt,
            stopping=Stopping(self.max_tokens, self.min_tokens, token_ids=self.ends),
            n=n,
            beams=self.beams,
        )


def by_transformers(model: PreTrainedModel, case: Case) -> list[Hypothesis]:
    """All `width` hypotheses, the best first."""
    ids = torch.tensor([case.prompt])
    found: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=case.beams.width,
        num_return_sequences=case.beams.width,
        length_penalty=case.beams.length_penalty,
        early_stopping=case.beams.early_stopping,
        max_new_tokens=case.max_tokens,
        min_new_tokens=case.min_tokens,
        eos_token_id=list(case.ends) or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences[:, len(case.prompt) :].tolist()
    return [
        Hypothesis(through_end(row, case.ends), score)
        for row, score in zip(rows, found.sequences_scores.tolist(), strict=True)
    ]


def through_end(tokens: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """Up to and with the first end token: what follows is padding."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: at + 1])


def check(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [hypothesis.tokens for hypothesis in found] == [h.tokens for h in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx(
        [h.score for h in expected], abs=TOLERANCE
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_search_alone(seed: int) -> None:
    """Few tokens, so that several of them end and hypotheses are many."""
    rng = Random(seed)
    model = tiny_model("gpt2", seed=seed, n_layer=1, n_head=1, n_inner=8, vocab_size=13)
    case = Case(
        tuple(rng.randrange(13) for _ in range(rng.randint(1, 6))),
        BeamParams(rng.randint(2, 6), rng.choice([-1.0, 0.0, 0.7, 1.0, 2.0]), rng.random() < 0.5),
        tuple(rng.sample(range(1, 13), rng.randint(0, 3))),
        max_tokens=rng.randint(1, 12),
        min_tokens=rng.choice([0, 0, 0, 1]),
    )
    search = BeamSearch(
        case.beams, case.ends, max_tokens=case.max_tokens, min_tokens=case.min_tokens
    )
    live: list[tuple[int, ...]] = [case.prompt]
    while not search.over:
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor(live)).logits[:, -1], -1)
        top = logprobs.topk(min(search.candidates, 13))
        candidates = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        children = search.advance([list(zip(*pair, strict=True)) for pair in candidates])
        live = [(*live[child.parent], child.token) for child in children]
    check(
        [Hypothesis(found.tokens, found.score) for found in search.finished],
        by_transformers(model, case),
    )


@dataclass(frozen=True)
class Reference:
    path: Path
    cases: dict[str, Case]
    expected: dict[str, list[Hypothesis]]
    # An ordinary request and its answer.
    greedy: Request
    greedy_tokens: tuple[int, ...]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2", "mistral"])
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Searches of every width, penalty and way to stop, ended by tokens that do occur."""
    family: str = request.param
    model = tiny_model(family)
    path = save(model, tmp_path_factory.mktemp(family))
    rng = Random(5)
    cases: dict[str, Case] = {}
    settings = itertools.product((2, 3, 4), (0.5, 1.0, 2.0), (False, True))
    for number, (width, penalty, early) in enumerate(settings):
        # Around the borders of blocks (8).
        prompt = tuple(rng.randrange(131) for _ in range((1, 7, 8, 9, 31)[number % 5]))
        case = Case(prompt, BeamParams(width, penalty, early))
        best, second, *_ = by_transformers(model, case)
        ends = (best.tokens[5], second.tokens[9], best.tokens[2])[: number % 4]
        case = replace(case, ends=tuple(dict.fromkeys(ends)), min_tokens=4 * (number % 3 == 2))
        cases[f"beams-{number}"] = case
    expected = {name: by_transformers(model, case) for name, case in cases.items()}
    prompt = tuple(rng.randrange(131) for _ in range(50))
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False)
    greedy = Request("greedy", prompt, SamplingParams(temperature=0.0), Stopping(STEPS))
    return Reference(path, cases, expected, greedy, tuple(tokens[0, 50:].tolist()))


def start(path: Path, world: int, **options: object) -> Driver:
    config = {
        "model": str(path),
        "tensor_parallel": world,
        "block_size": 8,
        "threads_per_rank": 1,
        **options,
    }
    driver = Driver(draw_up(ClusterConfig.model_validate(config)))
    driver.start(ThreadLauncher(world))
    return driver


def events(driver: Driver, requests: list[Request]) -> dict[str, list[TokenEvent]]:
    """All at once."""
    streams = {request.id: driver.submit(request) for request in requests}
    return {name: list(stream) for name, stream in streams.items()}


def check_all(driver: Driver, reference: Reference) -> None:
    searches = [case.request(name, case.beams.width) for name, case in reference.cases.items()]
    found = events(driver, [*searches[:9], reference.greedy, *searches[9:]])
    tokens = tuple(token for event in found.pop("greedy") for token in event.tokens)
    assert tokens == reference.greedy_tokens
    for name, case in reference.cases.items():
        assert [event.index for event in found[name]] == list(range(case.beams.width))
        check([whole(event, case) for event in found[name]], reference.expected[name])


def whole(event: TokenEvent, case: Case) -> Hypothesis:
    """A hypothesis as `transformers` has it, the end token included."""
    assert event.score is not None
    assert event.usage is not None
    ended = () if event.stop_token is None else (event.stop_token,)
    tokens = event.tokens + ended
    assert event.usage.completion_tokens == len(tokens)
    if ended:
        assert event.finish is FinishReason.STOP
    else:
        assert event.finish is FinishReason.LENGTH
        assert len(tokens) == case.max_tokens
    return Hypothesis(tokens, event.score)


def test_the_cases_are_what_they_should_be(reference: Reference) -> None:
    """Some searches end early, some late, and ends are among what they find."""
    lengths = [len(h.tokens) for found in reference.expected.values() for h in found]
    assert min(lengths) < 8
    assert max(lengths) == STEPS


@pytest.mark.parametrize("world", [1, 2])
def test_equals_transformers(reference: Reference, world: int) -> None:
    driver = start(reference.path, world, max_sequences=64)
    try:
        check_all(driver, reference)
        load = driver.load()
        assert load.preemptions == 0
        assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    finally:
        driver.stop()


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no-cache"])
def test_equals_transformers_where_hypotheses_run_in_turn(
    reference: Reference, prefix_caching: bool
) -> None:
    world = 2
    probe = draw_up(ClusterConfig(model=str(reference.path), tensor_parallel=world, block_size=8))
    driver = start(
        reference.path,
        world,
        max_sequences=6,
        kv_memory=9 * max(probe.block_bytes),  # the longest needs 9 of them
        prefix_caching=prefix_caching,
    )
    try:
        check_all(driver, reference)
        load = driver.load()
        assert load.preemptions > 0
        assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    finally:
        driver.stop()


def test_the_n_best_are_returned(reference: Reference) -> None:
    driver = start(reference.path, 1)
    try:
        requests = [
            case.request(name, case.beams.width - 1) for name, case in reference.cases.items()
        ]
        for name, found in events(driver, requests).items():
            case = reference.cases[name]
            check([whole(event, case) for event in found], reference.expected[name][:-1])
    finally:
        driver.stop()
