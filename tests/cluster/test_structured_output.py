"""Texts held to schemas, expressions and grammars, by a whole driver with ranks on threads."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.engine import Engine
from cluster.errors import InvalidRequest, NoToken
from cluster.request import (
    Constraint,
    FinishReason,
    Language,
    Request,
    SamplingParams,
    Stopping,
)
from cluster.text import TextStream
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher
from tests.unit.tiny_tokenizers import byte_fallback, byte_level

GREEDY = SamplingParams(temperature=0.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_names = (f"r{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes are tokens; the model has rows for more tokens than the tokenizer."""
    path = tmp_path_factory.mktemp("byte-level")
    byte_level().save_pretrained(path)
    save(tiny_model("llama", num_attention_heads=9, num_key_value_heads=3, vocab_size=275), path)
    return path


def start(model_dir: Path, world: int, **options: object) -> Driver:
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
def drivers(model_dir: Path) -> Iterator[dict[int, Driver]]:
    """By the number of ranks."""
    drivers = {world: start(model_dir, world) for world in (1, 2, 3)}
    yield drivers
    for driver in drivers.values():
        driver.stop()


def asking(language: Language, *source: str, prompt: str = "answer:", **changes: Any) -> Request:
    request = Request(next(_names), tuple(prompt.encode()), constraint=Constraint(language, source))
    return replace(request, **changes)


def for_json(schema: Any, **changes: Any) -> Request:
    return asking(Language.JSON_SCHEMA, json.dumps(schema), **changes)


def finish(driver: Driver, *requests: Request) -> list[tuple[str, list[int], FinishReason]]:
    """Text, tokens and end of each request, all at once."""
    results = []
    streams = [TextStream(driver.codec, one, driver.submit(one)) for one in requests]
    for stream in streams:
        deltas = list(stream)
        assert deltas[-1].finish is not None
        tokens = [token for delta in deltas for token in delta.tokens]
        results.append(("".join(delta.text for delta in deltas), tokens, deltas[-1].finish))
    return results


def again(request: Request, **changes: Any) -> Request:
    return replace(request, id=next(_names), **changes)


texts = st.text(st.characters(codec="utf-8"), max_size=4)
scalars = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.tuples(st.integers(-999, 0), st.integers(0, 999)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    ),
    st.integers(0, 5).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(texts | st.integers() | st.booleans(), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2,5}x?$"}),
    st.just({"type": "string", "format": "date"}),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3}),
        st.dictionaries(texts, inner, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": [*properties][:2],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    schema=schemas,
    temperature=st.sampled_from([0.0, 1.0]),
    world=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_any_schema_is_kept_and_taken_up_where_it_was_left(
    drivers: dict[int, Driver], schema: Any, temperature: float, world: int, data: st.DataObject
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=data.draw(st.integers(0, 99)))
    request = for_json(schema, sampling=sampling)
    [(text, tokens, end)] = finish(drivers[world], request)
    # Cut short, it is a beginning that the rest goes with: as a client resumes, on other ranks.
    known = data.draw(st.integers(0, max(0, len(tokens) - 1)))
    other = drivers[data.draw(st.sampled_from([1, 2, 3]))]
    resumed = again(request, generated=tuple(tokens[:known]))
    [(_, rest, end_again)] = finish(other, resumed)
    assert (tokens[:known] + rest, end_again) == (tokens, end)
    if end is FinishReason.STOP:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_language(drivers: dict[int, Driver], world: int, temperature: float) -> None:
    choices = ("yes", "no", "ye s\n", 'quo"te\\', "🙂")
    lark = 'start: "(" start ")" | /[xy]{1,3}/'
    wanted = [
        for_json(PERSON),
        asking(Language.REGEX, "[a-c]{2,6}/(one|two)"),
        asking(Language.CHOICES, *choices),
        asking(Language.LARK, lark, stopping=Stopping(max_tokens=64)),
    ]
    sampling = SamplingParams(temperature=temperature, seed=5)
    wanted = [replace(request, sampling=sampling) for request in wanted]
    found = finish(drivers[world], *wanted)
    (person, _, end), (match, _, _), (choice, _, _), (nested, tokens, cut) = found
    assert end is FinishReason.STOP
    jsonschema.validate(json.loads(person), PERSON)
    assert re.fullmatch("[a-c]{2,6}/(one|two)", match)
    assert choice in choices
    if cut is FinishReason.STOP:
        assert re.fullmatch(r"\(*[xy]{1,3}\)*", nested)
        assert nested.count("(") == nested.count(")")
    else:
        assert len(tokens) == 64
        assert re.fullmatch(r"\(*[xy]{0,3}\)*", nested)
    # Greedy or drawn, all ranks agree however many they are.
    assert [one[1] for one in found] == [
        one[1] for one in finish(drivers[1], *(again(request) for request in wanted))
    ]


@pytest.mark.parametrize("world", [1, 3])
def test_company_changes_nothing(drivers: dict[int, Driver], world: int) -> None:
    """Constrained, greedy, short-listed and whole-vocabulary sampling share steps."""
    free = Request("", tuple(b"free"), stopping=Stopping(max_tokens=30, ignore_eos=True))
    requests = [
        for_json(PERSON, sampling=SamplingParams(seed=1)),
        replace(free, sampling=GREEDY),
        replace(free, sampling=SamplingParams(top_k=5, seed=2)),
        replace(free, sampling=SamplingParams(top_p=0.9, seed=3, logprobs=2)),
        asking(Language.REGEX, "[a-z]{20}", sampling=GREEDY),
        replace(free, sampling=SamplingParams(top_k=50, seed=4)),
    ]
    alone = [finish(drivers[world], again(request))[0] for request in requests]
    assert finish(drivers[world], *map(again, requests)) == alone
    assert finish(drivers[world], *map(again, reversed(requests))) == alone[::-1]


def test_samples_of_a_request_are_held_each_for_itself(drivers: dict[int, Driver]) -> None:
    driver = drivers[2]
    request = asking(Language.REGEX, "[a-z]{12}", n=3, sampling=SamplingParams(seed=7))
    found = {0: "", 1: "", 2: ""}
    for delta in TextStream(driver.codec, request, driver.submit(request)):
        found[delta.index] += delta.text
    assert all(re.fullmatch("[a-z]{12}", text) for text in found.values())
    assert len(set(found.values())) == 3


def test_a_preempted_text_goes_on(model_dir: Path, drivers: dict[int, Driver]) -> None:
    """A pool too small for all: texts are dropped, computed again and matched again."""
    stopping = Stopping(max_tokens=110)
    requests = [
        asking(Language.REGEX, "[a-z]{100}", stopping=stopping, sampling=SamplingParams(seed=seed))
        for seed in range(4)
    ]
    expected = [finish(drivers[1], again(request))[0] for request in requests]
    small = start(model_dir, 1, block_size=8, kv_memory=24 * 8 * _kv_bytes_per_token(drivers[1]))
    try:
        assert finish(small, *requests) == expected
        assert small.load().preemptions > 0
    finally:
        small.stop()


def _kv_bytes_per_token(driver: Driver) -> int:
    [block] = driver.blueprint.block_bytes
    return block // driver.blueprint.config.block_size


def test_end_tokens_end_complete_texts_alone(drivers: dict[int, Driver]) -> None:
    """A stop token of the request that is also part of the text: the text comes first."""
    stop = b"b"[0] - b"!"[0]  # the tokens of a byte-level vocabulary begin with "!"
    codec = drivers[1].codec
    assert codec is not None
    assert codec.decode([stop]) == "b"
    request = asking(
        Language.REGEX,
        "[a-b]{10}",
        stopping=Stopping(token_ids=(stop,)),
        sampling=SamplingParams(logit_bias={stop: 100.0}),
    )
    [(text, _, end)] = finish(drivers[1], request)
    assert (text, end) == ("a" * 10, FinishReason.STOP)
    included = again(request, stopping=replace(request.stopping, include_stop=True))
    assert finish(drivers[1], included)[0][0] == "a" * 10 + "b"


def test_bias_counts_among_what_is_allowed(drivers: dict[int, Driver]) -> None:
    codec = drivers[2].codec
    assert codec is not None
    [a], [z] = codec.encode("a"), codec.encode("z")
    request = asking(
        Language.REGEX, "[a-c]{5}", sampling=SamplingParams(logit_bias={a: 100.0, z: 100.0})
    )
    assert finish(drivers[2], request)[0][0] == "aaaaa"


def test_log_probabilities_are_the_model_s_own(drivers: dict[int, Driver]) -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=1)
    request = asking(Language.REGEX, "[a-c]{5}", sampling=sampling)
    [event, *_] = list(drivers[1].submit(request))
    free = list(drivers[1].submit(again(request, constraint=None)))
    assert event.logprobs[0].top_tokens == free[0].logprobs[0].top_tokens
    assert event.logprobs[0].rank > 1


def test_a_text_that_cannot_go_on_ends_alone(drivers: dict[int, Driver]) -> None:
    """A generator trusts its edge; what got past it ends that request, with the reason."""
    other = Request(next(_names), (1, 2), GREEDY, Stopping(max_tokens=40, ignore_eos=True))
    stream = drivers[2].submit(other)
    for broken, reason in (
        (asking(Language.REGEX, "[ab"), "unclosed character class"),
        (asking(Language.REGEX, "b+", generated=(64,)), "byte 'a' fails parse"),
    ):
        with pytest.raises(NoToken, match=reason):
            list(drivers[2].submit(broken))
    assert sum(len(event.tokens) for event in stream) == 40


def test_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    """Every text begins with a space there; characters are bytes or words."""
    byte_fallback().save_pretrained(tmp_path)
    save(tiny_model("llama", vocab_size=280), tmp_path)
    driver = start(tmp_path, 2)
    try:
        request = for_json(PERSON, sampling=SamplingParams(seed=3))
        spaced = asking(Language.CHOICES, " a the", " hello or")
        (text, _, end), (choice, _, _) = finish(driver, request, spaced)
        assert end is FinishReason.STOP
        jsonschema.validate(json.loads(text), PERSON)
        assert choice in (" a the", " hello or")
    finally:
        driver.stop()


def test_from_python(model_dir: Path) -> None:
    config = ClusterConfig.model_validate(
        {"model": str(model_dir), "tensor_parallel": 2, "kv_memory": 1 << 20}
    )
    with Engine(config, launcher=ThreadLauncher(2)) as engine:
        person, other = engine.generate(["a", "b"], json_schema=PERSON, max_tokens=None)
        jsonschema.validate(json.loads(person.text), PERSON)
        jsonschema.validate(json.loads(other.text), PERSON)
        assert engine.generate("a", choices=["x", "y"]).text in ("x", "y")
        assert re.fullmatch("[0-9]{3}", engine.generate("a", regex="[0-9]{3}").text)
        assert engine.generate("a", lark='start: "q"').text == "q"
        for options, field in (
            ({"regex": "[a"}, "constraint.regex"),
            ({"json_schema": {"type": "strng"}}, "constraint.json_schema"),
            ({"json_schema": {1, 2}}, "constraint.json_schema"),
            ({"regex": "a", "lark": "b"}, "constraint"),
            ({"choices": [1]}, "constraint.choices"),
            ({"choices": []}, "constraint.choices"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                engine.generate("a", **options)  # type: ignore[arg-type]
            assert [one.field for one in refused.value.violations] == [field]
