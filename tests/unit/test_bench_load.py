"""What `headwise bench serve` sends, and when: a function of the seed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from deploy.bench.arrivals import arrivals
from deploy.bench.lengths import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Lengths, parse_lengths
from deploy.bench.settings import BadLoad, Settings
from deploy.bench.workload import Workload
from headwise import ModelInfo

END = 7
MODEL = ModelInfo(
    name="m",
    architecture="A",
    vocabulary=20,
    context=100,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=8,
    width=8,
    parameters=1,
    dtype="float32",
    eos_token_ids=(END,),
    has_tokenizer=False,
    has_chat_template=False,
)


def due_times(rate: float, burstiness: float, seed: int, count: int = 20_000) -> Any:
    return np.array(list(islice(arrivals(rate, burstiness, np.random.default_rng(seed)), count)))


def workload(model: ModelInfo = MODEL, **settings: Any) -> Workload:
    return Workload(Settings(**{"input_len": "12", "output_len": "5", **settings}), model)


def drawn(lengths: Lengths, count: int = 20_000) -> Any:
    rng = np.random.default_rng(0)
    return np.array([lengths.draw(rng) for _ in range(count)])


def test_arrivals_are_a_function_of_the_seed() -> None:
    assert (due_times(3, 1, seed=5, count=50) == due_times(3, 1, seed=5, count=50)).all()
    assert (due_times(3, 1, seed=5, count=50) != due_times(3, 1, seed=6, count=50)).all()


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_between_arrivals_have_the_mean_and_the_spread_asked_for(burstiness: float) -> None:
    gaps = np.diff(due_times(50, burstiness, seed=1), prepend=0.0)

    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(due_times(10, 1, seed=2))

    # P(gap > t) = exp(-rate t).
    assert (gaps > 0.1).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert (gaps > 0.3).mean() == pytest.approx(np.exp(-3), abs=0.01)


def test_a_number_is_every_length() -> None:
    lengths = parse_lengths("--input-len", "300", SHAREGPT_INPUT)

    assert set(drawn(lengths, 100)) == {300}
    assert lengths.least == 300


def test_lognormal_lengths_have_the_median_and_spread_given() -> None:
    lengths = drawn(parse_lengths("--input-len", "lognormal:200,0.5", SHAREGPT_INPUT))

    assert np.median(lengths) == pytest.approx(200, rel=0.02)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.02)
    assert lengths.min() >= 1


@pytest.mark.parametrize(("mix", "mean"), [(SHAREGPT_INPUT, 150), (SHAREGPT_OUTPUT, 320)])
def test_the_mixes_have_the_means_they_state(mix: Lengths, mean: float) -> None:
    lengths = drawn(parse_lengths("--input-len", "sharegpt", mix))

    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    assert lengths.max() <= 1024


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", "lognormal:0,1", "lognormal:9", "²"])
def test_a_length_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadLoad, match="--output-len="):
        parse_lengths("--output-len", text, SHAREGPT_OUTPUT)


def test_a_request_depends_on_seed_and_number_alone() -> None:
    forwards = [workload(seed=3).measured(number) for number in range(5)]
    backwards = [workload(seed=3).measured(number) for number in reversed(range(5))]
    another = [workload(seed=4).measured(number) for number in range(5)]

    assert forwards == backwards[::-1]
    assert all(a.prompt != b.prompt for a, b in zip(forwards, another, strict=True))
    assert len({request.options["seed"] for request in forwards}) == 5
    assert workload(seed=3).warmup(0).prompt != forwards[0].prompt


def test_prompts_are_ids_of_the_vocabulary_without_end_tokens() -> None:
    ids = [token for number in range(50) for token in workload().measured(number).prompt]

    assert set(ids) == set(range(20)) - {END}


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    load = workload(prefix_len=30)
    prompts = [load.measured(number).prompt for number in range(4)] + [load.warmup(0).prompt]

    assert {len(prompt) for prompt in prompts} == {42}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 5


def test_options_are_those_of_the_settings() -> None:
    options = workload(ignore_eos=False, temperature=0.5, timeout_s=9).measured(0).options

    assert options["max_tokens"] == 5
    assert (options["ignore_eos"], options["temperature"]) == (False, 0.5)
    assert options["timeout"] == 9


@pytest.mark.parametrize(
    ("input_len", "output_len"),
    [("sharegpt", "sharegpt"), ("sharegpt", "60"), ("60", "sharegpt"), ("lognormal:9999,1", "1")],
)
def test_drawn_lengths_are_cut_to_the_context(input_len: str, output_len: str) -> None:
    load = workload(prefix_len=20, input_len=input_len, output_len=output_len)
    requests = [load.measured(number) for number in range(200)]
    totals = [len(request.prompt) + (request.options["max_tokens"] or 0) for request in requests]

    assert max(totals) == MODEL.context
    assert min(len(request.prompt) for request in requests) > 20
    if output_len.isdigit():
        assert {request.options["max_tokens"] for request in requests} == {int(output_len)}
    if input_len.isdigit():
        assert {len(request.prompt) for request in requests} == {20 + int(input_len)}


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    assert len(workload(prefix_len=83).measured(0).prompt) == 95
    with pytest.raises(BadLoad, match=r"84 \+ 12 \+ 5 tokens .* m, 100"):
        workload(prefix_len=84)


def test_defaults_depend_on_the_kind_of_loop() -> None:
    closed, opened = Settings().completed(), Settings(rate=2, duration_s=5).completed()

    assert (closed.concurrency, closed.requests) == (8, 100)
    assert (opened.concurrency, opened.requests) == (None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"requests": 0},
        {"rate": 0},
        {"concurrency": 0},
        {"duration_s": -1},
        {"burstiness": 0, "rate": 1},
        {"burstiness": 2},
        {"temperature": -1},
        {"unheard": 1},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**values)
