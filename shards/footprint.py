"""What a layout costs: bytes of weights and KV cache per rank, bytes between ranks per token.

Arithmetic on a `ModelSpec` and a `Layout`. A leaf: no torch, no ray.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import Attention, LatentAttention, MixtureOfExperts, ModelSpec
from shards.quantization.scheme import Scheme

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def settle_dtype(dtype: str, spec: ModelSpec) -> str:
    """What "auto" stands for: the checkpoint's own; any other `dtype` stands for itself."""
    return spec.dtype if dtype == "auto" else dtype


@dataclass(frozen=True, slots=True)
class ModelSize:
    """`active` are the parameters that a token is multiplied with: all but lookup tables, and of
    experts as many as it is sent to."""

    parameters: int
    active: int


@dataclass(frozen=True, slots=True)
class RankFootprint:
    """Bytes on one rank: its weights, and the keys and values of one token in all layers."""

    weights: int
    kv_per_token: int


@dataclass(frozen=True, slots=True)
class Communication:
    """Between the ranks of a group; all zero where there is one rank.

    `all_reduces` is per step, however many tokens the step has: one after the embedding and two per
    layer, or one where its halves are parallel; and one more, of two numbers a token, where queries
    and keys are normed over all heads. `all_reduce_bytes` is what is summed per token, over all of
    these. `gather_bytes` is what the other ranks send to rank 0 per sampled token: their slices of
    the float32 logits.
    """

    all_reduces: int
    all_reduce_bytes: int
    gather_bytes: int


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What the KV cache holds of layers that attend alike: `bytes_per_token` in each of them, all
    heads together, counted once; `as_mha` if every query head had its own keys and values. Behind
    a `window` nothing need be kept."""

    kind: Literal["MHA", "GQA", "MQA", "MLA"]
    window: int | None
    layers: int
    bytes_per_token: int
    as_mha: int


def model_size(spec: ModelSpec) -> ModelSize:
    """Parameters of the whole model, a tied output layer counted once."""
    counted = [(p, _elements(p, p.shape[p.axis])) for p in parameters(spec)]
    return ModelSize(
        parameters=sum(elements for _, elements in counted),
        active=sum(elements for p, elements in counted if _is_active(p, spec)),
    )


def cache_kinds(spec: ModelSpec, dtype: str) -> tuple[CacheKind, ...]:
    """Side by side, in the order in which the layers bring them up; `dtype` is the cache's."""
    size = DTYPE_BYTES[dtype]
    layers = Counter(_cache_kind(layer.attention) for layer in spec.layers)
    return tuple(
        CacheKind(kind, window, count, size * channels, size * as_mha)
        for (kind, window, channels, as_mha), count in layers.items()
    )


def _cache_kind(
    attention: Attention | LatentAttention,
) -> tuple[Literal["MHA", "GQA", "MQA", "MLA"], int | None, int, int]:
    """The kind, the window, channels cached per token, and those that MHA would cache."""
    a = attention
    if isinstance(a, LatentAttention):
        return "MLA", None, a.head_dim, a.heads * (a.nope_dim + a.rope_dim + a.value_dim)
    kind: Literal["MHA", "GQA", "MQA"] = "GQA"
    if a.kv_heads in (1, a.heads):
        kind = "MHA" if a.kv_heads == a.heads else "MQA"
    return kind, a.window, 2 * a.kv_heads * a.head_dim, 2 * a.heads * a.head_dim


def rank_footprints(
    spec: ModelSpec,
    layout: Layout,
    dtype: str,
    schemes: Mapping[str, Scheme] = MappingProxyType({}),
) -> tuple[RankFootprint, ...]:
    """One per rank, with KV cache and weights in `dtype` (a key of `DTYPE_BYTES`), but for the
    parameters that `schemes` lists by name: see `shards/quantization/choice.py`."""
    size = DTYPE_BYTES[dtype]
    table = parameters(spec)
    footprints = []
    for rank in range(layout.world):
        kv_channels = sum(
            _cached_channels(layer.attention, len(split.kv_heads[rank]))
            for layer, split in zip(spec.layers, layout.layers, strict=True)
        )
        footprints.append(
            RankFootprint(
                weights=sum(
                    slice_bytes(p, len(layout.owned(p, rank)), dtype, schemes.get(p.name))
                    for p in table
                ),
                kv_per_token=size * kv_channels,
            )
        )
    return tuple(footprints)


def _cached_channels(attention: Attention | LatentAttention, kv_heads: int) -> int:
    """Of one token on a rank with so many KV heads. Latent attention caches its latent and rotated
    channels once, wherever there is a query head."""
    planes = 1 if isinstance(attention, LatentAttention) else 2
    return planes * kv_heads * attention.head_dim


def slice_bytes(parameter: Parameter, along_axis: int, dtype: str, scheme: Scheme | None) -> int:
    """Of a slice that is `along_axis` long where the parameter is cut; in `dtype` without a
    scheme."""
    if scheme is None:
        return DTYPE_BYTES[dtype] * _elements(parameter, along_axis)
    rows, inputs = parameter.sliced(along_axis)
    return scheme.bytes_of(rows, inputs)


def communication(spec: ModelSpec, layout: Layout, dtype: str) -> Communication:
    """With hidden states in `dtype` (a key of `DTYPE_BYTES`)."""
    if layout.world == 1:
        return Communication(all_reduces=0, all_reduce_bytes=0, gather_bytes=0)
    sums = 1 + sum(1 if layer.parallel else 2 for layer in spec.layers)
    statistics = sum(_norms_jointly(layer.attention) for layer in spec.layers)
    return Communication(
        all_reduces=sums + statistics,
        all_reduce_bytes=((sums - 1) * spec.width + (spec.embedding_width or spec.width))
        * DTYPE_BYTES[dtype]
        + statistics * 2 * DTYPE_BYTES["float32"],
        gather_bytes=(spec.vocabulary - len(layout.vocabulary[0])) * DTYPE_BYTES["float32"],
    )


def _norms_jointly(attention: Attention | LatentAttention) -> bool:
    if isinstance(attention, LatentAttention) or attention.qk_norm is None:
        return False
    return attention.qk_norm.joint


def tokens_that_fit(kv_memory: int, kv_per_token: int, block_size: int) -> int:
    """Tokens in as many whole blocks as `kv_memory` bytes hold; 0 where it is negative."""
    return max(0, kv_memory) // (kv_per_token * block_size) * block_size


def slowdown(spec: ModelSpec, layout: Layout) -> float:
    """A decode step's time over that of a perfect cut; 1 is perfect.

    Time is weights read over capacity. Attention, FFN and output layer each end with the ranks
    waiting for the slowest. A perfect cut deals every weight once, exactly by capacity: what is
    lost to KV copies, whole heads, alignment and replicated norms shows here. Experts count by the
    part of tokens that each gets where all get as many. Communication and the KV cache are not in
    it.
    """
    phases: defaultdict[tuple[int | None, bool], list[float]]
    phases = defaultdict(lambda: [0.0] * layout.world)
    for p in parameters(spec):
        if _is_multiplied(p, spec):
            seconds = phases[p.layer, _is_of_ffn(p)]
            share = share_of_tokens(p, spec)
            for rank, speed in enumerate(layout.capacity):
                seconds[rank] += share * _elements(p, len(layout.owned(p, rank))) / speed
    slowest = sum(max(seconds) for seconds in phases.values())
    return slowest * sum(layout.capacity) / model_size(spec).active


def _elements(parameter: Parameter, along_axis: int) -> int:
    """Elements of a slice that is `along_axis` long where the parameter is cut."""
    return math.prod(parameter.sliced(along_axis))


def _is_multiplied(parameter: Parameter, spec: ModelSpec) -> bool:
    """Whether a step reads it all, rather than one row per token."""
    if parameter.name == "positions.weight":
        return False
    return parameter.name != "embedding.weight" or spec.tied_embeddings


def _is_active(parameter: Parameter, spec: ModelSpec) -> bool:
    """Whether it is multiplied, and counts as one of a token's experts: these are all alike, so
    that the first stand for whichever are chosen."""
    mixture = _mixture(parameter, spec)
    chosen = mixture is None or (parameter.expert or 0) < mixture.router.top_k
    return chosen and _is_multiplied(parameter, spec)


def share_of_tokens(parameter: Parameter, spec: ModelSpec) -> float:
    """The part of a step's tokens that an expert gets; 1 for what all are multiplied with."""
    mixture = _mixture(parameter, spec)
    return 1.0 if mixture is None else mixture.router.top_k / mixture.experts


def _mixture(parameter: Parameter, spec: ModelSpec) -> MixtureOfExperts | None:
    """Where the parameter is an expert's."""
    if parameter.expert is None or parameter.layer is None:
        return None
    ffn = spec.layers[parameter.layer].ffn
    return ffn if isinstance(ffn, MixtureOfExperts) else None


def _is_of_ffn(parameter: Parameter) -> bool:
    return parameter.cut in (Cut.CHANNELS, Cut.EXPERT_CHANNELS, Cut.EXPERT)
