"""What a layout costs: bytes of weights and KV cache per rank, bytes between ranks per token.

Arithmetic on a `ModelSpec` and a `Layout`. A leaf: no torch, no ray.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import ModelSpec
from shards.quantization.scheme import Scheme

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def settle_dtype(dtype: str, spec: ModelSpec) -> str:
    """What "auto" stands for: the checkpoint's own; any other `dtype` stands for itself."""
    return spec.dtype if dtype == "auto" else dtype


@dataclass(frozen=True, slots=True)
class ModelSize:
    """`active` are the parameters that a decode step multiplies with: all but lookup tables."""

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
    layer. `all_reduce_bytes` is what is summed per token, over all of these. `gather_bytes` is what
    the other ranks send to rank 0 per sampled token: their slices of the float32 logits.
    """

    all_reduces: int
    all_reduce_bytes: int
    gather_bytes: int


def model_size(spec: ModelSpec) -> ModelSize:
    """Parameters of the whole model, a tied output layer counted once."""
    counted = [(p, _elements(p, p.shape[p.axis])) for p in parameters(spec)]
    return ModelSize(
        parameters=sum(elements for _, elements in counted),
        active=sum(elements for p, elements in counted if _is_multiplied(p, spec)),
    )


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
            2 * len(split.kv_heads[rank]) * layer.attention.head_dim
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
    all_reduces = 1 + 2 * len(spec.layers)
    return Communication(
        all_reduces=all_reduces,
        all_reduce_bytes=all_reduces * spec.width * DTYPE_BYTES[dtype],
        gather_bytes=(spec.vocabulary - len(layout.vocabulary[0])) * DTYPE_BYTES["float32"],
    )


def tokens_that_fit(kv_memory: int, kv_per_token: int, block_size: int) -> int:
    """Tokens in as many whole blocks as `kv_memory` bytes hold; 0 where it is negative."""
    return max(0, kv_memory) // (kv_per_token * block_size) * block_size


def slowdown(spec: ModelSpec, layout: Layout) -> float:
    """A decode step's time over that of a perfect cut; 1 is perfect.

    Time is weights read over capacity. Attention, FFN and output layer each end with the ranks
    waiting for the slowest. A perfect cut deals every weight once, exactly by capacity: what is
    lost to KV copies, whole heads, alignment and replicated norms shows here. Communication and the
    KV cache are not in it.
    """
    phases: defaultdict[tuple[int | None, bool], list[float]]
    phases = defaultdict(lambda: [0.0] * layout.world)
    for p in parameters(spec):
        if _is_multiplied(p, spec):
            seconds = phases[p.layer, p.cut is Cut.CHANNELS]
            for rank, speed in enumerate(layout.capacity):
                seconds[rank] += _elements(p, len(layout.owned(p, rank))) / speed
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
