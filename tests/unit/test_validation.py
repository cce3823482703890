"""Every fault of a request is named, with its field, its value and a remedy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest
from cluster.request import (
    BeamParams,
    Constraint,
    Language,
    ModelInfo,
    Request,
    SamplingParams,
    Stopping,
)
from cluster.text import TextCodec
from cluster.validation import max_prompt_bytes, validate
from tests.unit.tiny_tokenizers import TRICKY, byte_level

MODEL = ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    vocabulary=1000,
    context=64,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=8,
    width=8,
    parameters=1,
    dtype="float32",
    eos_token_ids=(0,),
)
GOOD = Request("r", prompt=(1, 2, 3))


def sampling(**fields: object) -> Request:
    return replace(GOOD, sampling=SamplingParams(**fields))


def stopping(**fields: object) -> Request:
    return replace(GOOD, stopping=Stopping(**fields))


def beams(width: int = 4, length_penalty: float = 1.0, **fields: object) -> Request:
    return replace(GOOD, beams=BeamParams(width, length_penalty), **fields)


def constrained(language: Language, *source: str, **fields: object) -> Request:
    return replace(GOOD, constraint=Constraint(language, source), **fields)


def faults(request: Request, **options: object) -> list[tuple[str, str]]:
    try:
        validate(request, MODEL, **{"has_tokenizer": True, **options})
    except InvalidRequest as error:
        return [(fault.field, fault.description) for fault in error.violations]
    return []


def test_prompt_that_one_step_must_hold() -> None:
    model = replace(MODEL, longest_prompt=32)
    validate(replace(GOOD, prompt=(1,) * 32), model, has_tokenizer=True)
    with pytest.raises(InvalidRequest, match="33 tokens are more than the 32 of a step"):
        validate(replace(GOOD, prompt=(1,) * 33), model, has_tokenizer=True)


@pytest.mark.parametrize(
    "request_",
    [
        GOOD,
        replace(GOOD, prompt=tuple(range(63))),
        replace(GOOD, n=64, id="x" * 128),
        replace(GOOD, generated=(999,), stopping=Stopping(max_tokens=2)),
        sampling(temperature=0, top_p=1, top_k=5, min_p=0.5, seed=2**64 - 1),
        sampling(temperature=100.0, presence_penalty=-2, frequency_penalty=2.0),
        sampling(logit_bias={0: -100, 999: 100.0}, logprobs=0, prompt_logprobs=20),
        stopping(max_tokens=61, min_tokens=61),
        stopping(strings=("\n", "é" * 512), token_ids=(0, 999)),
        beams(2, -10, n=2, stopping=Stopping(min_tokens=2, token_ids=(5,), include_stop=True)),
        beams(16, 10, sampling=SamplingParams(temperature=1.0, top_k=0)),
    ],
)
def test_what_is_allowed(request_: Request) -> None:
    assert faults(request_) == []


@pytest.mark.parametrize(
    ("request_", "field", "quoted"),
    [
        (replace(GOOD, prompt=()), "prompt", "at least one"),
        (replace(GOOD, prompt=tuple(range(64))), "prompt", "64 tokens"),
        (replace(GOOD, prompt=(1, 1000, 2000)), "prompt", "1000 at index 1"),
        (replace(GOOD, prompt=(1, 2, -1)), "prompt", "-1 at index 2"),
        (replace(GOOD, prompt=(1, 2.5)), "prompt", "2.5 at index 1"),
        (replace(GOOD, prompt=(1, True)), "prompt", "True at index 1"),
        (replace(GOOD, id="é" * 65), "request_id", "130 bytes"),
        (replace(GOOD, n=0), "n", "0 is not"),
        (replace(GOOD, n=65), "n", "1 to 64"),
        (replace(GOOD, generated=(1,), n=2), "generated", "n is 2"),
        (replace(GOOD, generated=(1000,)), "generated", "1000 at index 0"),
        (
            replace(GOOD, generated=(1, 2), stopping=Stopping(max_tokens=2)),
            "generated",
            "max_tokens 2",
        ),
        (replace(GOOD, generated=(1,) * 61), "generated", "context of 64"),
        (
            replace(GOOD, generated=(1,), sampling=SamplingParams(prompt_logprobs=0)),
            "output.prompt_logprobs",
            "leave prompt_logprobs out",
        ),
        (sampling(temperature=-0.5), "sampling.temperature", "-0.5"),
        (sampling(temperature=math.nan), "sampling.temperature", "nan"),
        (sampling(temperature=math.inf), "sampling.temperature", "inf"),
        (sampling(temperature=100.5), "sampling.temperature", "100.5"),
        (sampling(temperature="hot"), "sampling.temperature", "'hot'"),
        (sampling(top_p=0), "sampling.top_p", "(0, 1]"),
        (sampling(top_p=1.01), "sampling.top_p", "1.01"),
        (sampling(top_k=-1), "sampling.top_k", "-1"),
        (sampling(min_p=1), "sampling.min_p", "[0, 1)"),
        (sampling(min_p=-0.1), "sampling.min_p", "-0.1"),
        (sampling(repetition_penalty=0), "sampling.repetition_penalty", "[0.01, 100]"),
        (sampling(repetition_penalty=math.inf), "sampling.repetition_penalty", "inf"),
        (sampling(presence_penalty=2.1), "sampling.presence_penalty", "2.1"),
        (sampling(frequency_penalty=-2.1), "sampling.frequency_penalty", "-2.1"),
        (sampling(seed=-1), "sampling.seed", "-1"),
        (sampling(seed=2**64), "sampling.seed", str(2**64)),
        (sampling(logit_bias={5: 1, 1000: 1}), "sampling.logit_bias", "1000"),
        (sampling(logit_bias={5: -101}), "sampling.logit_bias", "-101"),
        (sampling(logit_bias={5: math.nan}), "sampling.logit_bias", "nan"),
        (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias", "1025"),
        (sampling(logprobs=21), "output.logprobs", "21"),
        (sampling(logprobs=-1), "output.logprobs", "-1"),
        (sampling(prompt_logprobs=21), "output.prompt_logprobs", "21"),
        (stopping(max_tokens=0), "stopping.max_tokens", "0 is not"),
        (stopping(max_tokens=62), "stopping.max_tokens", "at most 61"),
        (stopping(max_tokens=5, min_tokens=6), "stopping.min_tokens", "0 to 5"),
        (stopping(min_tokens=-1), "stopping.min_tokens", "-1"),
        (stopping(strings=("a", "")), "stopping.conditions", "empty"),
        (stopping(strings=("a",) * 17), "stopping.conditions", "17"),
        (stopping(strings=("é" * 513,)), "stopping.conditions", "1026 bytes"),
        (stopping(token_ids=(1, 1000)), "stopping.conditions", "1000 at index 1"),
        (stopping(token_ids=(1,) * 257), "stopping.conditions", "257"),
        (beams(1), "beam_search.width", "2 to 16"),
        (beams(17), "beam_search.width", "17"),
        (beams(length_penalty=10.5), "beam_search.length_penalty", "10.5"),
        (beams(length_penalty=math.nan), "beam_search.length_penalty", "nan"),
        (beams(4, n=5), "n", "5 of 4"),
        (beams(sampling=SamplingParams(temperature=0)), "sampling.temperature", "0 does"),
        (beams(sampling=SamplingParams(seed=0)), "sampling.seed", "0 does"),
        (beams(sampling=SamplingParams(logit_bias={1: 2.0})), "sampling.logit_bias", "{1: 2.0}"),
        (beams(sampling=SamplingParams(logprobs=0)), "output.logprobs", "0 does"),
        (beams(sampling=SamplingParams(prompt_logprobs=1)), "output.prompt_logprobs", "1 does"),
        (beams(stopping=Stopping(strings=("END",))), "stopping.conditions", "'END'"),
        (beams(generated=(1, 2)), "generated", "2 tokens"),
    ],
)
def test_a_fault_names_field_and_value(request_: Request, field: str, quoted: str) -> None:
    ((named, description),) = faults(request_)
    assert named == field
    assert quoted in description
    assert ":" in description  # the remedy follows


def test_stop_strings_need_a_tokenizer() -> None:
    ((field, description),) = faults(stopping(strings=("END",)), has_tokenizer=False)
    assert field == "stopping.conditions"
    assert "'END'" in description
    assert faults(stopping(token_ids=(5,)), has_tokenizer=False) == []


def test_hypotheses_need_a_vocabulary_to_go_on_with() -> None:
    small = replace(MODEL, vocabulary=6)
    validate(beams(5), small, has_tokenizer=True)
    with pytest.raises(InvalidRequest, match="vocabulary of 6, 2 of which end them"):
        validate(beams(5, stopping=Stopping(token_ids=(5,))), small, has_tokenizer=True)


def test_every_fault_is_named_at_once() -> None:
    request = Request(
        "x" * 129,
        prompt=(5000,),
        sampling=SamplingParams(temperature=-1, top_p=2, logprobs=99, logit_bias={-1: 1e9}),
        stopping=Stopping(max_tokens=0, strings=("",), token_ids=(-1,)),
        n=0,
        generated=(7777,),
    )
    assert [field for field, _ in faults(request)] == [
        "request_id",
        "prompt",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.logit_bias",
        "sampling.logit_bias",
        "stopping.max_tokens",
        "stopping.conditions",
        "stopping.conditions",
        "n",
        "generated",
        "generated",
        "output.logprobs",
    ]


def test_options() -> None:
    assert faults(replace(GOOD, n=3), max_samples=2)
    assert faults(replace(GOOD, prompt=()), prompt_field="messages")[0][0] == "messages"


def test_a_long_value_is_cut() -> None:
    ((_, description),) = faults(stopping(strings=("x" * 100_000,)))
    assert len(description) < 300


def test_max_prompt_bytes_refuses_no_prompt_that_fits() -> None:
    codec = TextCodec(byte_level())
    for text in TRICKY:
        if len(codec.encode(text)) <= MODEL.context - 1:
            assert len(text.encode()) <= max_prompt_bytes(codec, MODEL)
    assert max_prompt_bytes(codec, MODEL) < 10_000


@pytest.mark.parametrize(
    "request_",
    [
        constrained(Language.JSON_SCHEMA, "not looked at"),
        constrained(Language.REGEX, "é" * (32 << 10)),
        constrained(Language.CHOICES, *["c"] * 1024),
        constrained(Language.LARK, "x", sampling=SamplingParams(logit_bias={1: 1.0}), n=3),
    ],
)
def test_constraints_that_are_allowed(request_: Request) -> None:
    assert faults(request_) == []


@pytest.mark.parametrize(
    ("request_", "field", "quoted"),
    [
        (constrained(Language.JSON_SCHEMA, ""), "constraint.json_schema", "empty"),
        (constrained(Language.REGEX, "é" * (32 << 10) + "a"), "constraint.regex", "65537 bytes"),
        (constrained(Language.LARK, "a\ud800"), "constraint.lark", "surrogate"),
        (constrained(Language.CHOICES), "constraint.choices", "0 choices"),
        (constrained(Language.CHOICES, *["c"] * 1025), "constraint.choices", "1025 choices"),
        (constrained(Language.CHOICES, "a", ""), "constraint.choices", "choice 1 is empty"),
        (constrained(Language.CHOICES, "a" * 40_000, "b" * 40_000), "constraint.choices", "80000"),
        (
            constrained(Language.REGEX, "a", stopping=Stopping(ignore_eos=True)),
            "stopping.ignore_eos",
            "complete",
        ),
        (
            constrained(Language.REGEX, "a", stopping=Stopping(min_tokens=3)),
            "stopping.min_tokens",
            "3 does not go",
        ),
        (constrained(Language.REGEX, "a", beams=BeamParams(2)), "constraint", "beam search"),
    ],
)
def test_faults_of_constraints(request_: Request, field: str, quoted: str) -> None:
    [(named, description)] = faults(request_)
    assert named == field
    assert quoted in description


def test_a_constraint_needs_text_that_can_end() -> None:
    request = constrained(Language.REGEX, "a")
    [(field, description)] = faults(request, has_tokenizer=False)
    assert (field, "no tokenizer" in description) == ("constraint", True)
    endless = replace(MODEL, eos_token_ids=())
    with pytest.raises(InvalidRequest, match="no end token"):
        validate(request, endless, has_tokenizer=True)
    validate(replace(request, stopping=Stopping(token_ids=(5,))), endless, has_tokenizer=True)
