"""Which experts a token goes to: the routers' rules, and what is easily got wrong at the edges."""

from __future__ import annotations

import parts
import pytest
import torch
from test_parts import ATTENTION, EXPERT, SETS, TOLERANCE, VOCABULARY, model

from shards.kernels.reference.experts import route
from shards.models.spec import Layer, MixtureOfExperts, Router

EXPERTS = 6


def scores(tokens: int = 40, experts: int = 8) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(5))


def test_softmax_of_the_chosen_alone_is_softmax_renormalised() -> None:
    logits = scores()
    chosen, weights = route(logits, None, Router(3, renormalise=True))
    expected = logits.gather(1, chosen).softmax(-1)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(chosen.sort().values, logits.topk(3).indices.sort().values)


def test_without_renormalising_weights_are_the_scores_scaled() -> None:
    logits = scores()
    chosen, weights = route(logits, None, Router(2, scale=1.5))
    torch.testing.assert_close(weights, 1.5 * logits.softmax(-1).gather(1, chosen))


def test_a_correction_chooses_and_does_not_weigh() -> None:
    logits = scores()
    correction = torch.zeros(8)
    correction[3] = 10.0
    chosen, weights = route(logits, correction, Router(2, "sigmoid", correction=True))
    assert (chosen == 3).any(1).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, chosen))


@pytest.mark.parametrize(("group_score", "counted"), [("best", 1), ("best two", 2)])
def test_experts_come_from_the_best_groups(group_score: str, counted: int) -> None:
    logits = scores()
    choice = Router(3, groups=4, top_groups=2, group_score=group_score)  # type: ignore[arg-type]
    chosen, _ = route(logits, None, choice)
    of_groups = logits.softmax(-1).view(-1, 4, 2).topk(counted).values.sum(-1)
    best = of_groups.topk(2).indices
    assert (chosen[:, :, None] // 2 == best[:, None]).any(-1).all()


def test_sigmoids_that_all_round_to_nothing_weigh_nothing() -> None:
    _, weights = route(torch.full((2, 4), -1e4), None, Router(2, "sigmoid", renormalise=True))
    assert weights.tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("experts", [4, 8, 60, 256])
def test_among_equals_torch_topk_chooses(experts: int) -> None:
    """As `transformers` does, whose answers a model was tuned with."""
    logits = torch.zeros(3, experts)
    logits[1, experts // 2 :] = 1.0
    chosen, _ = route(logits, None, Router(2, renormalise=True))
    expected = logits.softmax(-1).topk(2).indices
    assert torch.equal(chosen.sort().values, expected.sort().values)


# What the router's bias says, so that every token goes where it wants.
BIASES = {
    "every token to the same experts": [50.0, 0.0, 0.0, 50.0, 0.0, 0.0],
    "an expert that gets none": [0.0, -50.0, 0.0, 0.0, 0.0, 0.0],
    "ties": [0.0] * EXPERTS,
}


@pytest.mark.parametrize("case", BIASES)
@pytest.mark.parametrize("kernels", SETS)
def test_lopsided_routing(kernels: str, case: str) -> None:
    assert lopsided(case, 1, kernels) < TOLERANCE


@pytest.mark.parametrize("case", BIASES)
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_lopsided_routing_over_ranks(expert_parallel: bool, case: str) -> None:
    assert lopsided(case, 4, "cpu", expert_parallel=expert_parallel) < TOLERANCE


def lopsided(case: str, world: int, kernels: str, *, expert_parallel: bool = False) -> float:
    router = Router(2, renormalise=True, bias=True)
    spec = model(Layer(ATTENTION, MixtureOfExperts(EXPERTS, EXPERT, router)))
    weights = parts.random_weights(spec)
    weights["layers.0.router.bias"] = torch.tensor(BIASES[case], dtype=torch.float64)
    if case == "ties":
        weights["layers.0.router.weight"].zero_()
    batches = parts.steps(VOCABULARY)
    reference = parts.Ranks(spec, 1, SETS["reference"], torch.float64, weights=weights)
    ranks = parts.Ranks(
        spec,
        world,
        SETS[kernels],
        torch.float32,
        weights=weights,
        expert_parallel=expert_parallel,
    )
    errors = [
        float((found - expected).abs().max() / expected.abs().max())
        for found, expected in zip(ranks.logits(batches), reference.logits(batches), strict=True)
    ]
    ranks.close()
    reference.close()
    return max(errors)
