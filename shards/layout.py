"""Who owns which heads, channels, experts and vocabulary rows: arithmetic, known before a start.

Everything is dealt in contiguous ranges, in rank order; `shards/dealing.py` has the rules and the
balance that they guarantee. Every rank holds a run of query heads, at least one, and a copy of each
KV head that its run reads. So a KV head lies on several ranks where ranks outnumber KV heads, or
where a run ends inside a group of query heads.

Experts are dealt one of two ways: whole, so that a rank holds a run of them, or each of them cut by
its channels, so that every rank holds a slice of all.

A leaf: no torch, no ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from shards.dealing import deal_heads, deal_rows, deal_whole
from shards.errors import IllegalSplit
from shards.models.parameters import Cut, Parameter
from shards.models.spec import Layer, MixtureOfExperts, ModelSpec
from shards.quantization.scheme import BLOCK

# Far beyond any two devices; what is cut by such numbers stays exact, and its balance finite.
_MOST_TIMES_AS_FAST = 1_000_000


@dataclass(frozen=True, slots=True)
class Range:
    """`start` up to, but not including, `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """One layer's query heads, KV heads and FFN channels: one range per rank each.

    In a mixture of experts `channels` are the shared expert's, `experts` those of which a rank
    holds anything, and `expert_channels` what it holds of each.
    """

    heads: tuple[Range, ...]
    kv_heads: tuple[Range, ...]
    channels: tuple[Range, ...]
    experts: tuple[Range, ...] = ()
    expert_channels: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A model dealt over `world` ranks.

    `capacity` is each rank's relative speed, as given (1 each by default). `layers` has one entry
    per layer of the model; equal layers share one object.
    """

    world: int
    capacity: tuple[float, ...]
    layers: tuple[LayerSplit, ...]
    vocabulary: tuple[Range, ...]

    def owned(self, parameter: Parameter, rank: int) -> Range:
        """The rows (axis 0) or columns (axis 1) along `parameter.axis` that `rank` holds, in
        elements: the whole axis of a replicated parameter."""
        whole = Range(0, parameter.shape[parameter.axis])
        if parameter.cut is Cut.REPLICATED:
            return whole
        if parameter.expert is not None and not self._holds_expert(parameter, rank):
            return Range(0, 0)
        if parameter.cut is Cut.EXPERT:
            return whole
        owned = self._dealt(parameter)[rank]
        return Range(owned.start * parameter.unit, owned.stop * parameter.unit)

    def _holds_expert(self, parameter: Parameter, rank: int) -> bool:
        assert parameter.layer is not None
        assert parameter.expert is not None
        runs = self.layers[parameter.layer].experts
        holders = [r for r, run in enumerate(runs) if run.start <= parameter.expert < run.stop]
        return rank == holders[0] if parameter.cut is Cut.EXPERT else rank in holders

    def _dealt(self, parameter: Parameter) -> tuple[Range, ...]:
        if parameter.layer is None:
            return self.vocabulary
        layer = self.layers[parameter.layer]
        if parameter.cut is Cut.QUERY_HEADS:
            return layer.heads
        if parameter.cut is Cut.KV_HEADS:
            return layer.kv_heads
        if parameter.cut is Cut.EXPERT_CHANNELS:
            return layer.expert_channels
        return layer.channels


def make_layout(
    spec: ModelSpec,
    world: int,
    capacity: Sequence[float] | None = None,
    *,
    expert_parallel: bool = False,
) -> Layout:
    """Deal `spec` over `world` ranks, evenly or by `capacity` (relative: 2,1,1 is 4,2,2).

    With `expert_parallel`, experts are dealt whole; else each is cut by its channels. Raises
    `IllegalSplit` where a rank would be left without a head, a channel, an expert or a vocabulary
    row, and for a capacity list of the wrong length or with anything but finite numbers above zero.
    """
    _check_world(spec, world, expert_parallel)
    given = (1.0,) * world if capacity is None else tuple(float(c) for c in capacity)
    weights = _whole_weights(given, world)
    splits: dict[_Shape, LayerSplit] = {}
    layers = []
    for layer in spec.layers:
        shape = _Shape.of(layer)
        if shape not in splits:
            splits[shape] = _split(shape, weights, expert_parallel)
        layers.append(splits[shape])
    return Layout(world, given, tuple(layers), _ranges(deal_rows(spec.vocabulary, weights)))


@dataclass(frozen=True, slots=True)
class _Shape:
    """What of a layer decides how it is cut. `channels` are those of its dense FFN or its shared
    expert, `width` those of each expert; 0 where there is none."""

    heads: int
    kv_heads: int
    channels: int
    experts: int = 0
    width: int = 0

    @classmethod
    def of(cls, layer: Layer) -> _Shape:
        a, f = layer.attention, layer.ffn
        if isinstance(f, MixtureOfExperts):
            shared = 0 if f.shared is None else f.shared.width
            return cls(a.heads, a.kv_heads, shared, f.experts, f.expert.width)
        return cls(a.heads, a.kv_heads, f.width)


def _split(shape: _Shape, weights: Sequence[int], expert_parallel: bool) -> LayerSplit:
    group = shape.heads // shape.kv_heads
    heads = _ranges(deal_heads(shape.heads, shape.kv_heads, weights))
    kv_heads = tuple(Range(run.start // group, (run.stop - 1) // group + 1) for run in heads)
    channels = _channels(shape.channels, weights)
    if not shape.experts:
        return LayerSplit(heads, kv_heads, channels)
    if expert_parallel:
        experts = _ranges(deal_whole(shape.experts, weights))
        expert_channels: tuple[Range, ...] = (Range(0, shape.width),) * len(weights)
    else:
        experts = (Range(0, shape.experts),) * len(weights)
        expert_channels = _channels(shape.width, weights)
    return LayerSplit(heads, kv_heads, channels, experts, expert_channels)


def _channels(channels: int, weights: Sequence[int]) -> tuple[Range, ...]:
    if not channels:
        return (Range(0, 0),) * len(weights)
    return _ranges(deal_rows(channels, weights, BLOCK))


def _ranges(bounds: Sequence[int]) -> tuple[Range, ...]:
    return tuple(Range(start, stop) for start, stop in pairwise(bounds))


def _check_world(spec: ModelSpec, world: int, expert_parallel: bool) -> None:
    most, things, thing = min(_limits(spec, expert_parallel), key=lambda limit: limit[0])
    if world > most:
        raise IllegalSplit(
            f"{most} {things} over tensor_parallel={world}: at most {most} ranks can own {thing}; "
            f"use tensor_parallel <= {most}"
        )
    if world < 1:
        raise IllegalSplit(
            f"{most} {things} over tensor_parallel={world}: at least one rank must own them; "
            f"use a tensor_parallel from 1 to {most}"
        )


def _limits(spec: ModelSpec, expert_parallel: bool) -> Iterator[tuple[int, str, str]]:
    """How many there are of each thing that every rank needs one of, and what it is called."""
    for shape in dict.fromkeys(_Shape.of(layer) for layer in spec.layers):
        yield shape.heads, "attention heads", "a head"
        if shape.channels:
            yield shape.channels, "FFN channels", "a channel"
        if shape.experts and expert_parallel:
            yield shape.experts, "experts", "an expert"
        elif shape.experts:
            yield shape.width, "channels of an expert", "a channel"
    yield spec.vocabulary, "vocabulary rows", "a row"


def _whole_weights(capacity: tuple[float, ...], world: int) -> tuple[int, ...]:
    """The capacities as the smallest whole numbers in the same proportion.

    Decimal, not binary, fractions are taken at their word: 0.3,0.1 is 3,1.
    """
    if len(capacity) != world:
        raise IllegalSplit(
            f"capacity lists {len(capacity)} ranks and tensor_parallel is {world}: "
            "give one number per rank"
        )
    for rank, c in enumerate(capacity):
        if not (math.isfinite(c) and c > 0):
            raise IllegalSplit(
                f"capacity of rank {rank} is {c:g}: give each rank a finite number above 0"
            )
    slow, fast = capacity.index(min(capacity)), capacity.index(max(capacity))
    if capacity[fast] > _MOST_TIMES_AS_FAST * capacity[slow]:
        raise IllegalSplit(
            f"capacity of rank {fast} is {capacity[fast] / capacity[slow]:g} times that of rank "
            f"{slow}: give ranks at most {_MOST_TIMES_AS_FAST:,} times each other's capacity"
        )
    exact = [Fraction(repr(c)) for c in capacity]
    scale = math.lcm(*(c.denominator for c in exact))
    whole = [int(c * scale) for c in exact]
    divisor = math.gcd(*whole)
    return tuple(w // divisor for w in whole)
