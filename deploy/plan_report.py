"""What `headwise plan` says about a split, as data: the object that `--json` prints."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from deploy.plan_prediction import PredictionPlan
from shards.cost.precision import Precision
from shards.footprint import (
    CacheKind,
    Communication,
    cache_kinds,
    communication,
    model_size,
    rank_footprints,
    slowdown,
    tokens_that_fit,
)
from shards.layout import LayerSplit, Layout, Range
from shards.models.spec import ModelSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayersPlan(_Frozen):
    """One way of cutting a layer, and the layers that are cut so. Ranges are one per rank.

    In a mixture of experts `channels` are the shared expert's, `experts` those of which a rank
    holds anything, and `expert_channels` what it holds of each.
    """

    layers: tuple[Range, ...]
    heads: tuple[Range, ...]
    kv_heads: tuple[Range, ...]
    channels: tuple[Range, ...]
    experts: tuple[Range, ...] = ()
    expert_channels: tuple[Range, ...] = ()


class RankPlan(_Frozen):
    """`tokens` is what fits into the memory that was given, in whole blocks; None without one.
    `fits` is false where the weights alone are more than that."""

    rank: int
    capacity: float
    vocabulary: Range
    weight_bytes: int
    kv_bytes_per_token: int
    tokens: int | None
    fits: bool


class PlanReport(_Frozen):
    """What `--json` prints. Sizes are bytes; ranges are half open.

    `bits_per_weight` is the average over all parameters. `tokens` and `sequences` (of `context`
    tokens each) are what the whole group can hold: its tightest rank decides. `slowdown` is a
    decode step's time over that of a perfect cut. `prediction` is None where `unpredicted` says
    why.
    """

    model: str
    architecture: str
    parameters: int
    active_parameters: int
    dtype: str
    bits_per_weight: float
    context: int
    tensor_parallel: int
    splits: tuple[LayersPlan, ...]
    cache_kinds: tuple[CacheKind, ...]
    ranks: tuple[RankPlan, ...]
    communication: Communication
    slowdown: float
    tokens: int | None
    sequences: int | None
    prediction: PredictionPlan | None = None
    unpredicted: str | None = None


def make_plan(
    spec: ModelSpec,
    layout: Layout,
    *,
    model: str,
    precision: Precision,
    context: int,
    kv_memory: int | None = None,
    memory_per_rank: int | None = None,
    block_size: int = 16,
    prediction: PredictionPlan | None = None,
    unpredicted: str | None = None,
) -> PlanReport:
    """`kv_memory` is what each rank gives to the KV cache; `memory_per_rank` what it gives to the
    KV cache and its weights together. In bytes, at most one of them."""
    footprints = rank_footprints(spec, layout, precision.dtype)
    weights = precision.rank_bytes(spec, layout)
    ranks = []
    for rank, footprint in enumerate(footprints):
        room = kv_memory
        if memory_per_rank is not None:
            room = memory_per_rank - weights[rank]
        tokens = None
        if room is not None:
            tokens = tokens_that_fit(room, footprint.kv_per_token, block_size)
        ranks.append(
            RankPlan(
                rank=rank,
                capacity=layout.capacity[rank],
                vocabulary=layout.vocabulary[rank],
                weight_bytes=weights[rank],
                kv_bytes_per_token=footprint.kv_per_token,
                tokens=tokens,
                fits=room is None or room >= 0,
            )
        )
    known = [rank.tokens for rank in ranks if rank.tokens is not None]
    tokens = min(known) if known else None
    size = model_size(spec)
    return PlanReport(
        model=model,
        architecture=spec.architecture,
        parameters=size.parameters,
        active_parameters=size.active,
        dtype=precision.dtype,
        bits_per_weight=precision.bits_per_weight(spec, layout),
        context=context,
        tensor_parallel=layout.world,
        splits=_splits(layout),
        cache_kinds=cache_kinds(spec, precision.dtype),
        ranks=tuple(ranks),
        communication=communication(spec, layout, precision.dtype),
        slowdown=slowdown(spec, layout),
        tokens=tokens,
        sequences=None if tokens is None else tokens // context,
        prediction=prediction,
        unpredicted=unpredicted,
    )


def _splits(layout: Layout) -> tuple[LayersPlan, ...]:
    alike: dict[LayerSplit, list[Range]] = {}
    for i, split in enumerate(layout.layers):
        runs = alike.setdefault(split, [])
        if runs and runs[-1].stop == i:
            runs[-1] = Range(runs[-1].start, i + 1)
        else:
            runs.append(Range(i, i + 1))
    return tuple(
        LayersPlan(
            layers=tuple(runs),
            heads=split.heads,
            kv_heads=split.kv_heads,
            channels=split.channels,
            experts=split.experts,
            expert_channels=split.expert_channels,
        )
        for split, runs in alike.items()
    )
