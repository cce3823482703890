"""Beam search as pure logic. That it equals `transformers` is shown in tests/parity."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from cluster.beams import BeamSearch, Child, Finished
from cluster.request import BeamParams

END = 9
Table = dict[tuple[int, ...], list[float]]


def log(*probabilities: float) -> list[tuple[int, float]]:
    """Candidates 0, 1, ... with these probabilities; the last one is the end token."""
    tokens = (*range(len(probabilities) - 1), END)
    return [(token, math.log(p)) for token, p in zip(tokens, probabilities, strict=True)]


def score(tokens: int, *probabilities: float, penalty: float = 1.0) -> float:
    return sum(map(math.log, probabilities)) / tokens**penalty


def search(
    width: int = 2, max_tokens: int = 8, min_tokens: int = 0, **params: object
) -> BeamSearch:
    beams = BeamParams(width, **params)  # type: ignore[arg-type]
    return BeamSearch(beams, {END}, max_tokens=max_tokens, min_tokens=min_tokens)


def close(found: tuple[Finished, ...]) -> list[tuple[tuple[int, ...], object]]:
    return [(hypothesis.tokens, pytest.approx(hypothesis.score)) for hypothesis in found]


def test_the_likeliest_continuations_of_all_hypotheses_live_on() -> None:
    beams = search()
    assert beams.candidates == 3
    assert beams.advance([log(0.5, 0.4, 0.1)]) == ((0, 0), (0, 1))
    # 0.5 * 0.3 is less than both continuations of the other one.
    assert beams.advance([log(0.3, 0.2, 0.1), log(0.5, 0.45, 0.05)]) == ((1, 0), (1, 1))
    assert not beams.over
    assert not beams.finished


def test_an_end_among_the_best_is_kept_and_replaced_by_the_next_likeliest() -> None:
    beams = search()
    assert beams.advance([log(0.3, 0.2, 0.4)]) == ((0, 0), (0, 1))
    assert beams.finished == (Finished((END,), math.log(0.4), stopped=True),)


def test_an_end_below_the_best_is_not_kept() -> None:
    beams = search()
    assert beams.advance([log(0.5, 0.3, 0.2)]) == ((0, 0), (0, 1))
    assert not beams.finished


def test_the_length_penalty_weighs_what_has_finished() -> None:
    for penalty in (0.5, 1.0, 2.0):
        beams = search(max_tokens=2, length_penalty=penalty)
        beams.advance([log(0.4, 0.1, 0.5)])
        assert beams.advance([log(0.6, 0.3, 0.1), log(0.1, 0.1, 0.1)]) == ()
        expected = [
            ((END,), score(1, 0.5)),
            ((0, 0), score(2, 0.4, 0.6, penalty=penalty)),
            ((0, 1), score(2, 0.4, 0.3, penalty=penalty)),
        ]
        expected.sort(key=lambda hypothesis: -hypothesis[1])
        assert close(beams.finished) == expected[:2]


def test_at_max_tokens_everything_ends() -> None:
    beams = search(max_tokens=1)
    assert beams.advance([log(0.3, 0.5, 0.2)]) == ()
    assert beams.over
    assert [(h.tokens, h.stopped) for h in beams.finished] == [((1,), False), ((0,), False)]


def test_early_stopping_ends_with_enough_finished_ones() -> None:
    for early in (False, True):
        beams = search(early_stopping=early, length_penalty=2.0)
        beams.advance([log(0.4, 0.1, 0.5)])
        beams.advance([log(0.3, 0.2, 0.5), log(0.1, 0.1, 0.1)])
        # log(0.12) / 2**2, the best of those that live, is better than log(0.5).
        assert beams.over == early
        assert [h.tokens for h in beams.finished] == [(0, END), (END,)]


def test_it_stops_when_the_best_live_one_is_no_better_than_the_worst_finished_one() -> None:
    beams = search()
    beams.advance([log(0.3, 0.2, 0.5)])
    assert beams.advance([log(0.1, 0.1, 0.8), log(0.1, 0.1, 0.1)]) == ()
    assert beams.over
    assert close(beams.finished) == [((END,), score(1, 0.5)), ((0, END), score(2, 0.3, 0.8))]


def test_no_end_before_min_tokens() -> None:
    beams = search(min_tokens=1)
    assert beams.advance([log(0.2, 0.1, 0.7)]) == ((0, 0), (0, 1))
    assert not beams.finished
    beams.advance([log(0.1, 0.1, 0.8), log(0.1, 0.1, 0.8)])
    assert [h.tokens for h in beams.finished] == [(0, END), (1, END)]


def test_ties_go_to_the_earlier_hypothesis_and_the_lower_token() -> None:
    beams = search()
    even = [(3, -1.0), (1, -1.0), (2, -1.0)]
    assert beams.advance([even]) == (Child(0, 1), Child(0, 2))
    assert beams.advance([even, even]) == (Child(0, 1), Child(0, 2))


def test_without_end_tokens_only_the_length_ends_it() -> None:
    beams = BeamSearch(BeamParams(2, early_stopping=True), (), max_tokens=3)
    assert beams.candidates == 2
    pair = [(0, -0.5), (1, -1.0)]
    beams.advance([pair])
    beams.advance([pair, pair])
    assert not beams.over
    beams.advance([pair, pair])
    assert [h.tokens for h in beams.finished] == [(0, 0, 0), (0, 0, 1)]


def test_fewer_tokens_than_hypotheses() -> None:
    beams = search(width=4, max_tokens=2)
    assert beams.advance([log(0.6, 0.4)]) == ((0, 0),)
    assert [h.tokens for h in beams.finished] == [(END,)]
    assert beams.advance([log(0.6, 0.4)]) == ()
    assert [h.tokens for h in beams.finished] == [(0, 0), (0, END), (END,)]


@pytest.mark.parametrize("seed", range(20))
def test_a_width_that_drops_nothing_finds_the_best_of_all(seed: int) -> None:
    """3 tokens and the end: at most 27 hypotheses live, so that beam search is exhaustive."""
    random = Random(seed)
    ends = random.choice([(), (3,)])
    table: Table = {}
    for length in range(4):
        for prefix in itertools.product(range(3), repeat=length):
            weights = [random.random() for _ in range(4)]
            table[prefix] = [math.log(weight / sum(weights)) for weight in weights]
    beams = BeamSearch(BeamParams(256, length_penalty=1.5), ends, max_tokens=4)
    live: list[tuple[int, ...]] = [()]
    while not beams.over:
        children = beams.advance(
            [[(t, p) for t, p in enumerate(table[prefix]) if t < 3 or ends] for prefix in live]
        )
        live = [(*live[child.parent], child.token) for child in children]
    every = {
        (*prefix, token): sum(table[prefix[:i]][t] for i, t in enumerate(prefix)) + logprob
        for prefix in table
        for token, logprob in enumerate(table[prefix])
        if token in ends or (token < 3 and len(prefix) == 3)
    }
    best = sorted(((p / len(t) ** 1.5, t) for t, p in every.items()), reverse=True)
    assert [h.tokens for h in beams.finished] == [tokens for _, tokens in best]
    assert [h.score for h in beams.finished] == pytest.approx([s for s, _ in best])
