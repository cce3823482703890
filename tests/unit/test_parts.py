"""Every part that a spec can name means the same to every kernel set, on any number of ranks: what
the reference computes in float64, alone.

No family and no checkpoint: the models here come out of the parts alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import parts
import pytest
import torch

from shards.kernels.cpu import CpuKernels
from shards.kernels.cuda import CudaKernels
from shards.kernels.reference import ReferenceKernels
from shards.models.spec import (
    Attention,
    Clamp,
    FeedForward,
    LatentAttention,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    QKNorm,
    Rotary,
    Router,
)

WIDTH, VOCABULARY = 36, 53
RMS, LAYER = Norm("rms", 1e-5), Norm("layer", 1e-5, bias=True)
ROTARY = Rotary(10_000.0, 8)
GATED = FeedForward(50, "silu", gated=True)
EXPERT = FeedForward(22, "silu", gated=True)
ATTENTION = Attention(6, 2, 8, 8**-0.5, rotary=ROTARY)
LATENT = LatentAttention(
    heads=6,
    latent=16,
    nope_dim=8,
    rope_dim=4,
    value_dim=10,
    scale=12**-0.5,
    norm=RMS,
    rotary=Rotary(10_000.0, 4, interleaved=True),
    query_rank=20,
)


def attending(**fields: object) -> Layer:
    return Layer(replace(ATTENTION, **fields), GATED)  # type: ignore[arg-type]


def mixing(router: Router, **fields: object) -> Layer:
    return Layer(ATTENTION, MixtureOfExperts(7, EXPERT, router, **fields))  # type: ignore[arg-type]


def model(*layers: Layer, norm: Norm = RMS, **fields: object) -> ModelSpec:
    return ModelSpec("parts", WIDTH, VOCABULARY, 64, layers, norm, **fields)  # type: ignore[arg-type]


# Sixteen experts, two of which each token takes, and one KV head for all query heads.
GPT4_LIKE = model(
    *[
        Layer(
            Attention(6, 1, 8, 8**-0.5, rotary=ROTARY),
            MixtureOfExperts(16, FeedForward(24, "gelu", gated=False), Router(2, renormalise=True)),
        )
    ]
    * 2
)
MODELS = {
    "qk norm": model(attending(qk_norm=QKNorm(RMS))),
    "qk norm, each head's own": model(
        attending(qk_norm=QKNorm(LAYER, own=True)), norm=replace(LAYER, bias=False)
    ),
    "qk norm over all heads": model(attending(qk_norm=QKNorm(RMS, joint=True))),
    "softcap and a window": model(attending(softcap=0.5, window=11), attending(softcap=0.5)),
    "sinks": model(attending(sinks=True, window=7), attending(sinks=True)),
    "alibi": model(attending(alibi=1.0, rotary=None)),
    "rotations that differ by layer": model(
        attending(rotary=Rotary(100.0, 8)), attending(rotary=Rotary(1e5, 4, interleaved=True))
    ),
    "norms after": model(replace(attending(), pre_norm=False, post_norm=True)),
    "norms on both sides": model(
        replace(attending(out_bias=True), post_norm=True), norm=LAYER, embedding_norm=True
    ),
    "parallel": model(replace(attending(out_bias=True), parallel=True), norm=LAYER),
    "parallel, one norm": model(replace(attending(), parallel=True, shared_norm=True)),
    "multipliers": model(
        replace(attending(out_bias=True), residual_scale=0.3),
        embedding_scale=5.0,
        logit_scale=0.25,
        logit_softcap=2.0,
        output_bias=True,
    ),
    "clamped gate": model(
        Layer(ATTENTION, replace(GATED, bias=True, clamp=Clamp(limit=0.5, alpha=1.7)))
    ),
    "latent attention": model(Layer(LATENT, GATED), Layer(LATENT, GATED)),
    "latent attention, plain queries": model(Layer(replace(LATENT, query_rank=None), GATED)),
    "experts": model(mixing(Router(3))),
    "experts, renormalised": model(mixing(Router(2, renormalise=True, bias=True))),
    "experts with biases": model(
        Layer(
            ATTENTION,
            MixtureOfExperts(
                5, replace(EXPERT, bias=True, clamp=Clamp(1.0, 1.7)), Router(2, renormalise=True)
            ),
        )
    ),
    "experts in groups": model(
        Layer(
            LATENT,
            MixtureOfExperts(
                8,
                EXPERT,
                Router(
                    3, "sigmoid", True, 2.5, correction=True, groups=4, top_groups=2,
                    group_score="best two",
                ),
                shared=FeedForward(44, "silu", gated=True),
            ),
        )
    ),
    "shared expert with a gate": model(
        attending(), mixing(Router(3), shared=GATED, shared_gate=True)
    ),
    "experts beside the attention": model(
        replace(mixing(Router(2), shared=GATED), parallel=True, shared_norm=True)
    ),
    "gpt-4-like": GPT4_LIKE,
}  # fmt: skip
MIXTURES = [
    name
    for name, spec in MODELS.items()
    if any(isinstance(layer.ffn, MixtureOfExperts) for layer in spec.layers)
]
SETS: dict[str, parts.Make] = {
    "reference": lambda dtype: ReferenceKernels(parts.CPU, dtype),
    "cpu": lambda dtype: CpuKernels(dtype, threads=1),
    "cpu, 3 threads": lambda dtype: CpuKernels(dtype, threads=3),
    "cuda, run on a CPU": lambda dtype: CudaKernels(parts.CPU, dtype),
}
# Sums of some hundred products of order 1, in float32.
TOLERANCE = 1e-5


@cache
def expected(name: str) -> list[torch.Tensor]:
    ranks = parts.Ranks(MODELS[name], 1, SETS["reference"], torch.float64)
    return ranks.logits(parts.steps(VOCABULARY))


def error(name: str, world: int, make: parts.Make, *, expert_parallel: bool = False) -> float:
    ranks = parts.Ranks(MODELS[name], world, make, torch.float32, expert_parallel=expert_parallel)
    found = ranks.logits(parts.steps(VOCABULARY))
    ranks.close()
    return max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected(name), strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernels", SETS)
def test_a_part_means_the_same_to_every_set(kernels: str, name: str) -> None:
    assert error(name, 1, SETS[kernels]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_part_can_be_cut(world: int, name: str) -> None:
    assert error(name, world, SETS["cpu"]) < TOLERANCE


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_experts_can_be_dealt_whole(world: int, name: str) -> None:
    assert error(name, world, SETS["cpu"], expert_parallel=True) < TOLERANCE


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_every_rank_counts_the_tokens_of_every_expert(expert_parallel: bool) -> None:
    ranks = parts.Ranks(GPT4_LIKE, 3, SETS["cpu"], torch.float32, expert_parallel=expert_parallel)
    batches = parts.steps(VOCABULARY)
    ranks.logits(batches)
    ranks.close()
    loads = [rank.decoder.expert_loads() for rank in ranks.ranks]
    assert loads[0] == loads[1] == loads[2]
    tokens = sum(len(batch.tokens_T) for batch in batches)
    assert {layer: sum(load) for layer, load in loads[0].items()} == {0: 2 * tokens, 1: 2 * tokens}


def test_latents_are_all_that_is_cached() -> None:
    ranks = parts.Ranks(MODELS["latent attention"], 2, SETS["cpu"], torch.float32)
    ranks.close()
    numbers = parts.BLOCKS * parts.BLOCK * (LATENT.latent + LATENT.rope_dim)
    for rank in ranks.ranks:
        assert [cache.nbytes for cache in rank.caches] == [4 * numbers] * 2


def test_a_block_of_latents_is_copied_whole() -> None:
    cache = SETS["reference"](torch.float32).allocate(3, 1, 4, 20, value_dim=16)
    cache.keys.copy_(torch.arange(cache.keys.numel()).view(cache.keys.shape))
    before = cache.keys.clone()
    cache.copy(torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert torch.equal(cache.keys, before[[0, 0, 1]])
    assert torch.equal(cache.values, cache.keys[..., :16])
