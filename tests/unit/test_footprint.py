"""What experts, latents and parallel halves cost, by the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_parts import ATTENTION, LATENT, MODELS, RMS, Layer, model

from shards.footprint import (
    cache_kinds,
    communication,
    model_size,
    rank_footprints,
    slowdown,
)
from shards.layout import make_layout
from shards.models.spec import FeedForward, MixtureOfExperts, QKNorm, Router

WIDTH = 36
EXPERT = FeedForward(22, "silu", gated=True)
EIGHT = MixtureOfExperts(8, EXPERT, Router(2), shared=FeedForward(44, "silu", gated=True))
MIXED = model(Layer(ATTENTION, EIGHT))


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    size = model_size(MIXED)
    idle = (8 - 2) * 3 * WIDTH * EXPERT.width
    lookups = MIXED.vocabulary * WIDTH  # the output layer is another matrix
    assert size.parameters - size.active == idle + lookups


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_hold_each_expert_once(expert_parallel: bool) -> None:
    """Against one rank, but for the copies of KV heads, norms and routers."""
    alone = rank_footprints(MIXED, make_layout(MIXED, 1), "float32")[0].weights
    layout = make_layout(MIXED, 2, expert_parallel=expert_parallel)
    both = sum(rank.weights for rank in rank_footprints(MIXED, layout, "float32"))
    norms, router = 3 * WIDTH, 8 * WIDTH
    kv_copies = sum(len(run) for run in layout.layers[0].kv_heads) - ATTENTION.kv_heads
    copied = norms + router + kv_copies * 2 * ATTENTION.head_dim * WIDTH
    assert both == alone + 4 * copied


def test_a_latent_is_cached_once_on_every_rank() -> None:
    spec = model(*[Layer(LATENT, EXPERT)] * 3)
    for rank in rank_footprints(spec, make_layout(spec, 3), "bfloat16"):
        assert rank.kv_per_token == 3 * 2 * (LATENT.latent + LATENT.rope_dim)


def test_kinds_of_attention_side_by_side() -> None:
    spec = model(
        *(Layer(replace(ATTENTION, kv_heads=n), EXPERT) for n in (6, 2, 1)),
        *[Layer(replace(ATTENTION, window=9), EXPERT)] * 2,
        Layer(LATENT, EXPERT),
    )
    mha = 2 * 6 * 8 * 4
    found = [
        (k.kind, k.window, k.layers, k.bytes_per_token, k.as_mha)
        for k in cache_kinds(spec, "float32")
    ]
    assert found == [
        ("MHA", None, 1, mha, mha),
        ("GQA", None, 1, mha // 3, mha),
        ("MQA", None, 1, mha // 6, mha),
        ("GQA", 9, 2, mha // 3, mha),
        ("MLA", None, 1, 4 * 20, 4 * 6 * (8 + 4 + 10)),
    ]


def test_parallel_halves_share_an_all_reduce_and_joint_norms_take_one_more() -> None:
    layer = Layer(ATTENTION, EXPERT)
    joint = replace(layer, attention=replace(ATTENTION, qk_norm=QKNorm(RMS, joint=True)))
    spec = model(layer, replace(layer, parallel=True), joint)
    between = communication(spec, make_layout(spec, 2), "float32")
    assert between.all_reduces == 1 + 2 + 1 + 3
    assert between.all_reduce_bytes == 4 * (6 * WIDTH + 2)


def test_unevenly_dealt_experts_are_a_slowdown() -> None:
    """A rank with one expert more than its share keeps the others waiting."""
    spec = MODELS["gpt-4-like"]
    even, uneven = (
        slowdown(spec, make_layout(spec, world, expert_parallel=True)) for world in (2, 3)
    )
    assert 1 <= even < uneven
