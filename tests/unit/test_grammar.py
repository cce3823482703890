"""Masks of a grammar over a tokenizer's tokens, one slot at a time."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch

from cluster.constraints import to_grammar
from cluster.request import Constraint, Language
from cluster.text import TextCodec
from shards.contract import NO_TOKEN, Sampling
from shards.grammar import GrammarError, GrammarTokenizer
from shards.sampling import Sampler
from tests.unit.tiny_tokenizers import byte_level

VOCABULARY = 280  # the model's: more rows than tokens


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(byte_level())


@pytest.fixture(scope="module")
def tokenizer(codec: TextCodec) -> GrammarTokenizer:
    return GrammarTokenizer(codec.tokenizer_json, codec.eos_token_ids)


def grammar(language: Language, *source: str) -> str:
    return to_grammar(Constraint(language, source))


def spelled(codec: TextCodec, allowed_V: np.ndarray) -> set[str]:
    return {codec.decode([token], skip_special_tokens=False) for token in np.flatnonzero(allowed_V)}


def accepts(tokenizer: GrammarTokenizer, codec: TextCodec, source: str, text: str) -> bool:
    matcher = tokenizer.compile(source)
    return all(matcher.advance(token) for token in codec.encode(text)) and matcher.complete


def test_only_what_goes_on_is_allowed(tokenizer: GrammarTokenizer, codec: TextCodec) -> None:
    matcher = tokenizer.compile(grammar(Language.REGEX, "(the|a)b?"))
    end = codec.eos_token_ids
    assert spelled(codec, matcher.allowed(end, VOCABULARY)) == {"t", "a"}
    matcher.advance(codec.encode("a")[0])
    twin = matcher.copy()
    assert spelled(codec, matcher.allowed(end, VOCABULARY)) == {"b", "<|endoftext|>", "<|end|>"}
    # The request says what ends it, not the tokenizer.
    assert spelled(codec, matcher.allowed((70,), VOCABULARY)) == {"b", codec.decode([70])}
    assert not matcher.advance(codec.encode("c")[0])
    assert "byte 'c'" in matcher.failed
    assert not matcher.allowed(end, VOCABULARY).any()
    assert twin.advance(codec.encode("b")[0])
    assert twin.complete


def test_a_model_may_have_fewer_rows_than_its_tokenizer(
    tokenizer: GrammarTokenizer, codec: TextCodec
) -> None:
    allowed_V = tokenizer.compile(grammar(Language.REGEX, ".*")).allowed((), 100)
    assert allowed_V.shape == (100,)
    assert allowed_V[:94].all()  # printable ASCII: each begins a text


@pytest.mark.parametrize(
    ("text", "legal"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{\n  "a": 1,\n  "b": [\n    1\n  ]\n}', True),
        ('{"a":  1}', False),
        ('{"a":1\n\n}', False),
        ('{"a":1}\n', False),
        (' {"a":1}', False),
    ],
)
def test_white_space_in_json_is_bounded(
    tokenizer: GrammarTokenizer, codec: TextCodec, text: str, legal: bool
) -> None:
    source = grammar(Language.JSON_SCHEMA, '{"type": "object"}')
    assert accepts(tokenizer, codec, source, text) == legal


def test_a_schema_may_say_how_it_is_spaced(tokenizer: GrammarTokenizer, codec: TextCodec) -> None:
    spaced = json.dumps({"type": "object", "x-guidance": {"whitespace_flexible": False}})
    source = grammar(Language.JSON_SCHEMA, spaced)
    assert accepts(tokenizer, codec, source, '{"a":1}')
    wide = json.dumps({"type": "object", "x-guidance": {"whitespace_pattern": r"[ \t\n]+"}})
    source = grammar(Language.JSON_SCHEMA, wide)
    assert accepts(tokenizer, codec, source, '{"a":   1}')


def test_a_faulty_grammar_says_so(tokenizer: GrammarTokenizer) -> None:
    with pytest.raises(GrammarError, match="unclosed"):
        tokenizer.compile(grammar(Language.REGEX, "[a"))
    with pytest.raises(GrammarError, match="fixed bytes"):
        GrammarTokenizer("{}", ())


def test_sampling_under_a_grammar(tokenizer: GrammarTokenizer, codec: TextCodec) -> None:
    """Beside slots without one, whatever was bias or most likely, and again from its beginning."""
    end = codec.eos_token_ids
    held = Sampling(
        temperature=0,
        grammar=grammar(Language.REGEX, "[a-c]{6}"),
        end_tokens=end,
        logit_bias={codec.encode("z")[0]: 100.0},
    )
    drawn = msgspec.structs.replace(held, temperature=1, seed=3, top_k=2, top_p=0.9, min_p=0.01)
    free = Sampling(temperature=0)
    prompt = np.array([1, 2], np.int32)
    sampler = Sampler(VOCABULARY, 3, "cpu", tokenizer)
    for slot, sampling in enumerate((held, free, drawn)):
        sampler.start(slot, sampling, prompt, 2)
    rng = torch.Generator().manual_seed(0)
    history: list[list[int]] = []
    for position in range(2, 10):
        logits_SV = torch.randn((3, VOCABULARY), generator=rng)
        before = logits_SV.clone()
        tokens, _ = sampler.sample(logits_SV, [0, 1, 2], [position] * 3)
        assert torch.equal(logits_SV, before)
        assert tokens[1] == int(logits_SV[1].argmax())
        if history and position < 9:
            known = np.array([1, 2, *(row[2] for row in history)], np.int32)
            fresh = Sampler(VOCABULARY, 1, "cpu", tokenizer)
            fresh.start(0, drawn, known, 2)
            assert fresh.sample(logits_SV[2:], [0], [position])[0] == [tokens[2]]
        history.append(tokens)
    for column in (0, 2):
        text = [row[column] for row in history]
        assert codec.decode(text[:6]).strip("abc") == ""
        assert text[6] in end


def test_what_is_planned_behind_an_end_is_no_fault(
    tokenizer: GrammarTokenizer, codec: TextCodec
) -> None:
    """The next plan is under way when an end token is drawn."""
    sampling = Sampling(
        temperature=0, grammar=grammar(Language.REGEX, "a"), end_tokens=codec.eos_token_ids
    )
    sampler = Sampler(VOCABULARY, 1, "cpu", tokenizer)
    sampler.start(0, sampling, np.array([1], np.int32), 1)
    logits_SV = torch.zeros((1, VOCABULARY))
    tokens = [sampler.sample(logits_SV, [0], [position])[0][0] for position in range(1, 4)]
    assert tokens[0] == codec.encode("a")[0]
    assert tokens[1] in codec.eos_token_ids
    assert tokens[2] != NO_TOKEN
    assert sampler.fault(0) == ""


@pytest.mark.parametrize(
    ("source", "generated", "fault"),
    [
        (grammar(Language.REGEX, "[a"), [], "unclosed"),
        (grammar(Language.REGEX, "a"), [70], "doesn't satisfy"),
    ],
)
def test_where_nothing_may_follow_no_token_is_picked(
    tokenizer: GrammarTokenizer, source: str, generated: list[int], fault: str
) -> None:
    sampler = Sampler(VOCABULARY, 2, "cpu", tokenizer)
    sampler.start(0, Sampling(grammar=source), np.array([1, *generated], np.int32), 1)
    sampler.start(1, Sampling(), np.array([1], np.int32), 1)
    tokens, _ = sampler.sample(torch.zeros((2, VOCABULARY)), [0, 1], [2, 2])
    assert tokens[0] == NO_TOKEN
    assert tokens[1] != NO_TOKEN
    assert fault in sampler.fault(0)
    assert sampler.fault(1) == ""
    # The slot's next sequence has nothing to do with it.
    sampler.end(0)
    sampler.start(0, Sampling(), np.array([1], np.int32), 1)
    assert sampler.sample(torch.zeros((1, VOCABULARY)), [0], [2])[0] != [NO_TOKEN]
    assert sampler.fault(0) == ""


def test_barring_all_that_is_allowed_leaves_no_token(
    tokenizer: GrammarTokenizer, codec: TextCodec
) -> None:
    [a] = codec.encode("a")
    sampling = Sampling(grammar=grammar(Language.REGEX, "a"), logit_bias={a: -np.inf})
    sampler = Sampler(VOCABULARY, 1, "cpu", tokenizer)
    sampler.start(0, sampling, np.array([1], np.int32), 1)
    assert sampler.sample(torch.zeros((1, VOCABULARY)), [0], [1])[0] == [NO_TOKEN]


def test_without_a_tokenizer_no_token_is_picked() -> None:
    sampler = Sampler(VOCABULARY, 1, "cpu")
    sampler.start(0, Sampling(grammar="start: /a/"), np.array([1], np.int32), 1)
    assert sampler.sample(torch.zeros((1, VOCABULARY)), [0], [1])[0] == [NO_TOKEN]
    assert "no tokenizer" in sampler.fault(0)
