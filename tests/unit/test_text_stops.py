"""StopMatcher against the definition: the match that ends first, of those the longest."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text import StopMatcher

TEXT = st.text("aab\n", max_size=40)
STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, strings: list[str]) -> tuple[int, str] | None:
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            return end, max(complete, key=len)
    return None


@given(TEXT, STRINGS, st.booleans(), st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=400, deadline=None)
def test_equals_the_definition_for_any_pieces(
    text: str, strings: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(strings, include)
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    emitted, seen = "", ""
    for start, stop in itertools.pairwise(bounds):
        seen += text[start:stop]
        delta, matched = matcher.push(text[start:stop])
        emitted += delta
        if matched is not None:
            end = first_match(seen, strings)
            assert end is not None
            assert matched == end[1]
            assert emitted == seen[: end[0] if include else end[0] - len(matched)]
            return
        assert first_match(seen, strings) is None
        held = seen[len(emitted) :]
        assert seen.startswith(emitted)
        # Exactly what could still become a match is held back.
        beginnings = [s[:n] for s in strings for n in range(1, len(s))]
        assert held == max((b for b in beginnings if seen.endswith(b)), key=len, default="")
    assert emitted + matcher.flush() == text


@pytest.mark.parametrize(
    ("strings", "text", "emitted", "matched"),
    [
        (["\n\n"], "one\n\ntwo", "one", "\n\n"),
        (["bc", "abcd"], "xabcd", "xa", "bc"),  # ends first
        (["bc", "abc"], "xabcd", "x", "abc"),  # same end: the longest
        (["aab"], "aaab", "a", "aab"),  # overlapping beginnings
        (["🙂!"], "so 🙂!", "so ", "🙂!"),
    ],
)
def test_examples(strings: list[str], text: str, emitted: str, matched: str) -> None:
    assert StopMatcher(strings).push(text) == (emitted, matched)
    kept = text[: text.index(emitted) + len(emitted)] + matched
    assert StopMatcher(strings, include_stop=True).push(text) == (kept, matched)


def test_unarmed_matches_pass_and_what_they_begin_counts_later() -> None:
    matcher = StopMatcher(["abab"])
    assert matcher.push("xabab", armed=False) == ("xab", None)
    assert matcher.push("ab!") == ("", "abab")


def test_flush_forgets_what_had_begun() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("a") == ("", None)
    assert matcher.flush() == "a"
    assert matcher.push("b") == ("b", None)
