"""The sampler: known answers, reference processors, distributions, independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shards.contract import NO_TOKEN, Sampling
from shards.sampling import Sampler, SamplingError
from shards.sampling.philox import philox, uniform
from shards.sampling.truncation import draw, truncate

VOCABULARY = 300
ONES = 0xFFFFFFFF


def logits(
    rows: int, vocabulary: int = VOCABULARY, seed: int = 0, scale: float = 3
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, vocabulary), generator=generator) * scale


def started(
    *samplings: Sampling,
    vocabulary: int = VOCABULARY,
    tokens: list[int] | None = None,
    prompt: int = 1,
) -> Sampler:
    """A sampler with one slot per sampling; all have the same tokens."""
    sampler = Sampler(vocabulary, len(samplings), "cpu")
    for slot, sampling in enumerate(samplings):
        sampler.start(slot, sampling, np.array(tokens or [0], np.int32), prompt)
    return sampler


def drawn(sampling: Sampling, row_V: torch.Tensor, count: int, **start: Any) -> list[int]:
    """The tokens of positions 0 to count-1, one after the other, all with the same logits."""
    sampler = started(sampling, vocabulary=len(row_V), **start)
    return [sampler.sample(row_V[None], [0], [position])[0][0] for position in range(count)]


def drawn_together(sampling: Sampling, row_V: torch.Tensor, count: int) -> list[int]:
    """As `drawn`, in one batch of sequences that know nothing of each other."""
    sampler = started(*[sampling] * count, vocabulary=len(row_V))
    return sampler.sample(row_V.expand(count, -1), range(count), range(count))[0]


# The published vectors of Random123, and one with all words different.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    # Beside another one, so that a mix-up of rows or words would show.
    counters = np.array([counter, (1, 2, 3, 4)], np.uint64)
    assert philox(counters, np.array([key, (5, 6)], np.uint64))[0].tolist() == list(words)


def test_uniform_is_even_and_below_one() -> None:
    u = uniform(np.zeros(20000, np.uint64), np.arange(20000))
    assert u.dtype == np.float64
    assert 0 <= u.min() < u.max() < 1
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    # 43.8 is the 99.9th percentile of chi-square with 19 degrees of freedom.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8


@pytest.mark.parametrize("seed", [0, 1 << 63, (1 << 64) - 1])
def test_any_64_bit_seed_works(seed: int) -> None:
    tokens = drawn(Sampling(seed=seed), logits(1)[0], 20)
    assert tokens == drawn(Sampling(seed=seed), logits(1)[0], 20)
    assert tokens != drawn(Sampling(seed=seed ^ 1), logits(1)[0], 20)
    assert tokens != drawn(Sampling(seed=seed ^ 1 << 40), logits(1)[0], 20)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(seed=1), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(seed=2, temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (Sampling(seed=3, temperature=2), [x**0.5 / 6.14626 for x in (1, 2, 3, 4)]),
        (Sampling(seed=4, top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(seed=5, top_p=0.8), [0, 2 / 9, 3 / 9, 4 / 9]),
        (Sampling(seed=6, min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(seed=7, logit_bias={0: math.log(4)}), [4 / 13, 2 / 13, 3 / 13, 4 / 13]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    count = 4000
    tokens = drawn_together(sampling, torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), count)
    found = np.bincount(tokens, minlength=4)
    assert [n == 0 for n in found] == [p == 0 for p in expected]
    chi_square = sum(
        (n - p * count) ** 2 / (p * count) for n, p in zip(found, expected, strict=True) if p
    )
    assert chi_square < 16.3, "the 99.9th percentile with 3 degrees of freedom"


def test_defaults_change_nothing() -> None:
    """The token is the inverse of softmax's cumulative sum at u(seed, position)."""
    row_V = logits(1)[0]
    u = torch.from_numpy(uniform(np.zeros(50, np.uint64), np.arange(50)))
    cumulative_V = row_V.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative_V, u, right=True).tolist()
    assert drawn(Sampling(), row_V, 50) == expected


EVERYTHING = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7, top_k=20, seed=1),
    Sampling(top_p=0.9, seed=2, logprobs=2),
    Sampling(top_p=0.999, temperature=5, seed=3),
    Sampling(min_p=0.05, seed=4),
    Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=5),
    Sampling(temperature=0, repetition_penalty=1.5),
    Sampling(logit_bias={3: 5.0, 7: -4.0}, seed=6),
    Sampling(barred=(1, 2), barred_before=4, logprobs=0, seed=7),
    Sampling(top_k=5, top_p=0.5, min_p=0.1, temperature=1.5, seed=8),
]


@pytest.mark.parametrize("vocabulary", [37, 2000])
def test_a_row_does_not_depend_on_its_batch(vocabulary: int) -> None:
    slots, steps = list(range(len(EVERYTHING))), 8
    step_logits = [logits(len(slots), vocabulary, seed) for seed in range(steps)]
    together = started(*EVERYTHING, vocabulary=vocabulary, tokens=[5, 5, 9], prompt=3)
    shuffled = started(*EVERYTHING, vocabulary=vocabulary, tokens=[5, 5, 9], prompt=3)
    order = slots[::-2] + slots[-2::-2]
    expected = [
        together.sample(x, slots, [3 + t] * len(slots))[0] for t, x in enumerate(step_logits)
    ]
    for t, x in enumerate(step_logits):
        tokens, _ = shuffled.sample(x[order], order, [3 + t] * len(slots))
        assert tokens == [expected[t][slot] for slot in order]
    for slot in slots:
        alone = started(*EVERYTHING, vocabulary=vocabulary, tokens=[5, 5, 9], prompt=3)
        found = [
            alone.sample(x[slot : slot + 1], [slot], [3 + t])[0][0]
            for t, x in enumerate(step_logits)
        ]
        assert found == [row[slot] for row in expected]


@pytest.mark.parametrize("sampling", EVERYTHING)
def test_a_resumed_sequence_goes_on_with_the_same_tokens(sampling: Sampling) -> None:
    """Started anew with what it had generated, as after a preemption."""
    step_logits = [logits(1, seed=seed) for seed in range(10)]
    sampler, tokens = started(sampling, tokens=[5, 9], prompt=2), [5, 9]
    for x in step_logits:
        tokens += sampler.sample(x, [0], [len(tokens)])[0]
    for cut in (3, 7):
        resumed = tokens[:cut]
        sampler.start(0, sampling, np.array(resumed, np.int32), 2)
        for x in step_logits[cut - 2 :]:
            resumed += sampler.sample(x, [0], [len(resumed)])[0]
        assert resumed == tokens


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    row_V = torch.zeros(VOCABULARY)
    row_V[[7, 9, 200]] = 4.0
    assert drawn(Sampling(temperature=0), row_V, 2) == [7, 7]
    assert drawn(Sampling(temperature=1e-42, top_k=1), row_V, 1) == [7]


def test_greedy_without_features_costs_one_argmax() -> None:
    """No other operation touches as many elements as the vocabulary has."""
    sampler = started(*[Sampling(temperature=0)] * 4)
    x_SV = logits(4)
    with torch.profiler.profile(record_shapes=True) as profile:
        sampler.sample(x_SV, [0, 1, 2, 3], [1] * 4)
    wide = [
        event.name
        for event in profile.events()
        if event.input_shapes and [4, VOCABULARY] in event.input_shapes
    ]
    assert sorted(wide) == ["aten::argmax", "aten::gather"]


def hidden(
    processor: Any, x_RV: torch.Tensor, tokens_RN: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.isneginf(processor(tokens_RN, x_RV.clone()))


@pytest.mark.parametrize("vocabulary", [50, 5000])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, 1), (10, 1), (49, 1), (50, 1), (1500, 1), (0, 0.01), (0, 0.5), (0, 0.9), (0, 0.999),
     (20, 0.7), (1500, 0.999), (5, 0.99)],
)  # fmt: skip
@pytest.mark.parametrize("candidates", [1, 16, 1024])
def test_kept_tokens_are_those_of_transformers(
    vocabulary: int, top_k: int, top_p: float, candidates: int
) -> None:
    x_RV = logits(6, vocabulary)
    x_RV[1] *= 0.1  # so flat that no few candidates hold the mass
    expected_RV = x_RV.double()
    if 0 < top_k < vocabulary:
        expected_RV = TopKLogitsWarper(top_k)(None, expected_RV)
    if top_p < 1:
        expected_RV = TopPLogitsWarper(top_p)(None, expected_RV)
    weights_RV = torch.exp(x_RV - x_RV.amax(-1, True))
    before_RV = weights_RV.clone()
    k_R = torch.full((6,), top_k if 0 < top_k < vocabulary else vocabulary)
    truncate(weights_RV, x_RV, k_R, torch.full((6,), top_p, dtype=torch.float64), candidates)
    kept_RV = weights_RV > 0
    assert torch.equal(weights_RV[kept_RV], before_RV[kept_RV])
    assert torch.equal(kept_RV, ~torch.isneginf(expected_RV))


def test_top_p_of_equal_tokens_keeps_no_more_than_it_needs_and_the_lowest() -> None:
    row_V = torch.zeros(VOCABULARY)
    row_V[250] = 1.0
    assert set(drawn_together(Sampling(top_p=0.5), torch.zeros(8), 200)) == {0, 1, 2, 3}
    weights_RV = (row_V - 1).exp()[None]
    truncate(weights_RV, row_V[None], torch.tensor([VOCABULARY]), torch.tensor([0.1]), 4)
    mass = 0.1 * (VOCABULARY - 1 + math.e)
    assert weights_RV.nonzero()[:, 1].tolist() == [*range(math.ceil(mass - math.e)), 250]


def test_top_k_keeps_all_that_equal_the_kth() -> None:
    row_V = torch.tensor([0.0, 2, 1, 1, 1])
    assert set(drawn_together(Sampling(top_k=2, temperature=5), row_V, 300)) == {1, 2, 3, 4}


def test_min_p_is_that_of_transformers() -> None:
    row_V = logits(1, 40)[0]
    allowed = (~hidden(MinPLogitsWarper(0.2), row_V[None]))[0].nonzero().flatten().tolist()
    assert 1 < len(allowed) < 20
    assert set(drawn_together(Sampling(min_p=0.2), row_V, 500)) == set(allowed)


def test_min_p_of_one_leaves_the_most_probable() -> None:
    row_V = logits(1, 40)[0]
    assert set(drawn_together(Sampling(min_p=1), row_V, 50)) == {int(row_V.argmax())}


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.5, 2), (1 - 2.0**-53, 2)])
def test_the_ends_of_the_distribution_fall_on_tokens_that_are_kept(u: float, token: int) -> None:
    x_RV = torch.tensor([[-torch.inf, 0, 0, -torch.inf]])
    one, off = torch.ones(1), torch.tensor([4])
    u_R = torch.tensor([u], dtype=torch.float64)
    assert draw(x_RV, torch.zeros(1), one, off, one.double(), 0 * one, u_R).tolist() == [token]


def test_truncation_comes_after_temperature() -> None:
    row_V = torch.tensor([0.6, 0.3, 0.1]).log()
    assert set(drawn_together(Sampling(top_p=0.55), row_V, 200)) == {0}
    assert set(drawn_together(Sampling(top_p=0.55, temperature=3), row_V, 200)) == {0, 1}


def picked_after(
    sampling: Sampling, row_V: torch.Tensor, tokens: list[int], prompt: int
) -> torch.Tensor:
    """Which token wins, greedily, when each in turn is lifted by a bias of its own size: this shows
    the adjusted logits through the public interface alone, to within 1e-3."""
    found = torch.empty(len(row_V))
    for token in range(len(row_V)):
        low, high = -200.0, 200.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            # A reference token of fixed logit 0 that no feature touches.
            x_V = torch.full((len(row_V) + 1,), -1e4)
            x_V[token], x_V[-1] = row_V[token], middle
            sampler = started(sampling, vocabulary=len(x_V), tokens=tokens, prompt=prompt)
            won = sampler.sample(x_V[None], [0], [len(tokens)])[0][0] == token
            low, high = (middle, high) if won else (low, middle)
        found[token] = (low + high) / 2
    return found


HISTORY = [0, 1, 1, 2, 3, 3, 3, 1]  # of which the first four are the prompt
PENALISED = torch.tensor([2.0, -2.0, 1.0, -1.0, 3.0, -3.0])


def test_repetition_penalty_is_that_of_transformers() -> None:
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([HISTORY]), PENALISED[None].clone()
    )
    found = picked_after(Sampling(temperature=0, repetition_penalty=1.7), PENALISED, HISTORY, 4)
    torch.testing.assert_close(found, expected[0], atol=2e-3, rtol=0)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    counts = torch.tensor([0.0, 1, 0, 3, 0, 0])
    presence = Sampling(temperature=0, presence_penalty=0.6)
    found = picked_after(presence, PENALISED, HISTORY, 4)
    torch.testing.assert_close(found, PENALISED - 0.6 * (counts > 0), atol=2e-3, rtol=0)
    frequency = Sampling(temperature=0, frequency_penalty=-0.4)
    found = picked_after(frequency, PENALISED, HISTORY, 4)
    torch.testing.assert_close(found, PENALISED + 0.4 * counts, atol=2e-3, rtol=0)


def test_sampled_tokens_count_for_the_penalties() -> None:
    """Each pick costs a token 1, so greedy takes turns among near-equal tokens."""
    row_V = torch.tensor([1.0, 0.9, 0.8, -5])
    frequency = Sampling(temperature=0, frequency_penalty=1)
    assert drawn(frequency, row_V, 6) == [0, 1, 2, 0, 1, 2]
    repetition = Sampling(temperature=0, repetition_penalty=2)
    assert drawn(repetition, row_V, 4, tokens=[3], prompt=1) == [0, 1, 2, 0]


def test_more_distinct_tokens_than_first_reserved_are_counted() -> None:
    sampling = Sampling(temperature=0, frequency_penalty=100)
    tokens = drawn(sampling, logits(1)[0], VOCABULARY)
    assert sorted(tokens) == list(range(VOCABULARY))


@pytest.mark.parametrize("ended", [True, False])
def test_a_new_sequence_in_a_slot_starts_clean(ended: bool) -> None:
    row_V = torch.tensor([1.0, 0.9])
    first = Sampling(temperature=0, frequency_penalty=1, logit_bias={1: 3.0})
    sampler = started(first, vocabulary=2)
    assert sampler.sample(row_V[None], [0], [1])[0] == [1]
    if ended:
        sampler.end(0)
    sampler.start(0, Sampling(temperature=0), np.array([0], np.int32), 1)
    assert sampler.sample(row_V[None], [0], [1])[0] == [0]


def test_barred_tokens_come_back_at_their_position_and_beat_any_bias() -> None:
    row_V = torch.tensor([5.0, 4, 3])
    sampling = Sampling(temperature=0, barred=(0, 1), barred_before=3, logit_bias={0: 100.0})
    assert drawn(sampling, row_V, 5) == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("other", [Sampling(temperature=0), Sampling(top_p=0.9), Sampling(top_k=3)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_give_no_token_and_harm_nobody_else(other: Sampling, bad: float) -> None:
    x_SV = logits(3)
    expected, _ = started(Sampling(), other, other).sample(x_SV, [0, 1, 2], [4, 9, 9])
    x_SV[1, 17] = bad
    found, _ = started(Sampling(), other, other).sample(x_SV, [0, 1, 2], [4, 9, 9])
    assert found == [expected[0], NO_TOKEN, expected[2]]


def test_all_tokens_barred_is_refused() -> None:
    with pytest.raises(SamplingError, match="min_tokens: every token"):
        started(Sampling(barred=(0, 1, 2), barred_before=5), vocabulary=3)
    tokens, _ = started(Sampling(), vocabulary=3).sample(torch.full((1, 3), -torch.inf), [0], [1])
    assert tokens == [NO_TOKEN]


@pytest.mark.parametrize("sampling", [Sampling(logit_bias={300: 1.0}), Sampling(barred=(-1,))])
def test_tokens_outside_the_vocabulary_are_refused(sampling: Sampling) -> None:
    with pytest.raises(SamplingError, match="outside the vocabulary; use ids from 0 to 299"):
        started(sampling)


def test_logprobs_are_of_the_raw_logits() -> None:
    x_SV = logits(3)
    raw = Sampling(temperature=0, logprobs=3)
    twisted = Sampling(temperature=0.3, logit_bias={250: 100.0}, logprobs=0)
    tokens, found = started(raw, twisted, Sampling()).sample(x_SV, [0, 1, 2], [1, 1, 1])
    expected = x_SV.log_softmax(-1)
    assert found[2] is None
    assert found[0] is not None
    assert (found[0].token, found[0].rank) == (tokens[0], 1)
    assert found[0].top_tokens == tuple(x_SV[0].topk(3).indices.tolist())
    assert found[0].top_logprobs == tuple(expected[0].topk(3).values.tolist())
    assert found[1] is not None
    assert (found[1].token, found[1].top_tokens) == (250, ())
    assert found[1].logprob == float(expected[1, 250])
    assert found[1].rank == 1 + int((x_SV[1] > x_SV[1, 250]).sum()) > 1


def test_top_logprobs_break_ties_by_id_and_stop_at_the_vocabulary() -> None:
    sampler = started(Sampling(temperature=0, logprobs=9), vocabulary=5)
    _, (found,) = sampler.sample(torch.tensor([[0.0, 1, 0, 1, 0]]), [0], [1])
    assert found is not None
    assert found.top_tokens == (1, 3, 0, 2, 4)
    (many,) = started(Sampling()).prompt_logprobs(torch.zeros(1, VOCABULARY), [0], 100)
    assert many.top_tokens == tuple(range(100))


@pytest.mark.parametrize("top_n", [0, 2])
def test_prompt_logprobs(top_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.sampling.sampler._PROMPT_ELEMENTS", 2 * VOCABULARY)
    x_TV, tokens = logits(5), [4, 0, 299, 7, 7]
    found = started(Sampling()).prompt_logprobs(x_TV, np.array(tokens, np.int32), top_n)
    expected = x_TV.log_softmax(-1)
    assert [entry.token for entry in found] == tokens
    assert [entry.logprob for entry in found] == [
        float(expected[t, i]) for t, i in enumerate(tokens)
    ]
    top = expected.topk(2).indices[:, :top_n].tolist()
    assert [list(entry.top_tokens) for entry in found] == top
    assert started(Sampling()).prompt_logprobs(x_TV[:0], [], top_n) == ()


def test_logits_are_left_as_they_were() -> None:
    x_SV = logits(len(EVERYTHING))
    before = x_SV.clone()
    started(*EVERYTHING).sample(x_SV, range(len(EVERYTHING)), [2] * len(EVERYTHING))
    assert torch.equal(x_SV, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_draws_the_same_tokens() -> None:
    samplers = [Sampler(VOCABULARY, len(EVERYTHING), device) for device in ("cpu", "cuda")]
    slots = range(len(EVERYTHING))
    for sampler in samplers:
        for slot, sampling in enumerate(EVERYTHING):
            sampler.start(slot, sampling, np.array([5, 9], np.int32), 2)
    for step in range(20):
        x_SV = logits(len(EVERYTHING), seed=step)
        positions = [2 + step] * len(EVERYTHING)
        tokens, _ = samplers[0].sample(x_SV, slots, positions)
        assert samplers[1].sample(x_SV.cuda(), slots, positions)[0] == tokens
