"""Who owns which heads, FFN channels and vocabulary rows: arithmetic, known before anything starts.

Everything is dealt in contiguous ranges, in rank order; `shards/dealing.py` has the rules and the
balance that they guarantee. Every rank holds a run of query heads, at least one, and a copy of each
KV head that its run reads. So a KV head lies on several ranks where ranks outnumber KV heads, or
where a run ends inside a group of query heads.

A leaf: no torch, no ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from shards.dealing import deal_heads, deal_rows
from shards.errors import IllegalSplit
from shards.models.parameters import Cut, Parameter
from shards.models.spec import ModelSpec
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
    """One layer's query heads, KV heads and FFN channels: one range per rank each."""

    heads: tuple[Range, ...]
    kv_heads: tuple[Range, ...]
    channels: tuple[Range, ...]


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
        if parameter.cut is Cut.REPLICATED:
            return Range(0, parameter.shape[parameter.axis])
        owned = self._dealt(parameter)[rank]
        return Range(owned.start * parameter.unit, owned.stop * parameter.unit)

    def _dealt(self, parameter: Parameter) -> tuple[Range, ...]:
        if parameter.layer is None:
            return self.vocabulary
        layer = self.layers[parameter.layer]
        if parameter.cut is Cut.QUERY_HEADS:
            return layer.heads
        if parameter.cut is Cut.KV_HEADS:
            return layer.kv_heads
        return layer.channels


def make_layout(spec: ModelSpec, world: int, capacity: Sequence[float] | None = None) -> Layout:
    """Deal `spec` over `world` ranks, evenly or by `capacity` (relative: 2,1,1 is 4,2,2).

    Raises `IllegalSplit` where a rank would be left without a head, a channel or a vocabulary row,
    and for a capacity list of the wrong length or with anything but finite numbers above zero.
    """
    _check_world(spec, world)
    given = (1.0,) * world if capacity is None else tuple(float(c) for c in capacity)
    weights = _whole_weights(given, world)
    splits: dict[tuple[int, int, int], LayerSplit] = {}
    layers = []
    for layer in spec.layers:
        shape = (layer.attention.heads, layer.attention.kv_heads, layer.ffn.width)
        if shape not in splits:
            splits[shape] = _split(*shape, weights)
        layers.append(splits[shape])
    return Layout(world, given, tuple(layers), _ranges(deal_rows(spec.vocabulary, weights)))


def _split(heads: int, kv_heads: int, channels: int, weights: Sequence[int]) -> LayerSplit:
    group = heads // kv_heads
    runs = _ranges(deal_heads(heads, kv_heads, weights))
    return LayerSplit(
        heads=runs,
        kv_heads=tuple(Range(run.start // group, (run.stop - 1) // group + 1) for run in runs),
        channels=_ranges(deal_rows(channels, weights, BLOCK)),
    )


def _ranges(bounds: Sequence[int]) -> tuple[Range, ...]:
    return tuple(Range(start, stop) for start, stop in pairwise(bounds))


def _check_world(spec: ModelSpec, world: int) -> None:
    limits = [
        *((layer.attention.heads, "attention heads", "a head") for layer in spec.layers),
        *((layer.ffn.width, "FFN channels", "a channel") for layer in spec.layers),
        (spec.vocabulary, "vocabulary rows", "a row"),
    ]
    most, things, thing = min(limits, key=lambda limit: limit[0])
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
