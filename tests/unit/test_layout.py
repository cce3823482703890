"""What `make_layout` promises: ownership, balance, optimality, and refusals in one sentence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import IllegalSplit
from shards.layout import Layout, Range, make_layout
from shards.models.parameters import Cut, parameters
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    LearnedPositions,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    Router,
)


def model(
    heads: int = 9,
    kv_heads: int = 3,
    *,
    ffn: int = 1536,
    vocabulary: int = 49152,
    layers: Sequence[tuple[int, int, int]] = (),
) -> ModelSpec:
    """A model of `layers` (heads, kv_heads, ffn), or of two equal ones."""
    shapes = layers or [(heads, kv_heads, ffn)] * 2
    return ModelSpec(
        architecture="Test",
        width=32,
        vocabulary=vocabulary,
        context=128,
        layers=tuple(
            Layer(
                Attention(h, k, head_dim=4, scale=0.5, qkv_bias=True, out_bias=True),
                FeedForward(f, "silu", gated=True, bias=True),
            )
            for h, k, f in shapes
        ),
        norm=Norm("layer", 1e-5, bias=True),
        positions=LearnedPositions(128),
    )


def lengths(ranges: Sequence[Range]) -> list[int]:
    return [len(owned) for owned in ranges]


def costs(layout: Layout) -> list[int]:
    split = layout.layers[0]
    return [2 * len(q) + 2 * len(kv) for q, kv in zip(split.heads, split.kv_heads, strict=True)]


# Machines that run tests are busy: an example may take the time that it takes.
unhurried = settings(deadline=None)
capacities = st.one_of(st.integers(1, 12), st.floats(0.01, 100))


@st.composite
def cases(draw: st.DrawFn, most_heads: int = 24) -> tuple[ModelSpec, int, list[float] | None]:
    kv_heads = draw(st.integers(1, most_heads))
    heads = kv_heads * draw(st.integers(1, most_heads // kv_heads))
    spec = model(
        heads,
        kv_heads,
        ffn=draw(st.integers(heads, 5000)),
        vocabulary=draw(st.integers(heads, 5000)),
    )
    world = draw(st.integers(1, heads))
    capacity = draw(st.none() | st.lists(capacities, min_size=world, max_size=world))
    return spec, world, capacity


def assert_dealt(ranges: Sequence[Range], total: int) -> None:
    """Every one of 0..total-1 once, in order, and no range empty."""
    assert [i for owned in ranges for i in range(owned.start, owned.stop)] == list(range(total))
    assert all(len(owned) > 0 for owned in ranges)


@unhurried
@given(cases())
def test_everything_is_owned_once_and_no_rank_is_empty(
    case: tuple[ModelSpec, int, list[float] | None],
) -> None:
    spec, world, capacity = case
    layout = make_layout(spec, world, capacity)
    assert layout.world == world == len(layout.vocabulary)
    assert_dealt(layout.vocabulary, spec.vocabulary)
    for layer, split in zip(spec.layers, layout.layers, strict=True):
        assert_dealt(split.heads, layer.attention.heads)
        assert_dealt(split.channels, layer.ffn.width)


@unhurried
@given(cases())
def test_a_rank_holds_exactly_the_kv_heads_that_its_query_heads_read(
    case: tuple[ModelSpec, int, list[float] | None],
) -> None:
    spec, world, capacity = case
    attention = spec.layers[0].attention
    split = make_layout(spec, world, capacity).layers[0]
    for q, kv in zip(split.heads, split.kv_heads, strict=True):
        needed = {head // attention.group for head in range(q.start, q.stop)}
        assert set(range(kv.start, kv.stop)) == needed
    held = {head for kv in split.kv_heads for head in range(kv.start, kv.stop)}
    assert held == set(range(attention.kv_heads))


@unhurried
@given(cases(most_heads=64))
def test_head_balance_bound(case: tuple[ModelSpec, int, list[float] | None]) -> None:
    spec, world, capacity = case
    attention = spec.layers[0].attention
    layout = make_layout(spec, world, capacity)
    exact = [Fraction(repr(c)) for c in layout.capacity]

    def bound(c: Fraction) -> Fraction:
        most = max(1, math.ceil(attention.heads * c / sum(exact)))
        groups = min(attention.kv_heads, 1 + math.ceil(Fraction(most - 1, attention.group)))
        return (2 * most + 2 * groups) / c

    slowest = max(cost / c for cost, c in zip(costs(layout), exact, strict=True))
    assert slowest <= max(bound(c) for c in exact)


def reference_choice(
    attention: Attention, world: int, capacity: Sequence[float]
) -> tuple[Fraction, Fraction, int]:
    """(slowest, sum of squares, KV copies) of the best of all cuts, each tried."""
    exact = [Fraction(repr(float(c))) for c in capacity]

    def key(stops: Sequence[int]) -> tuple[Fraction, Fraction, int]:
        ends = [0, *stops, attention.heads]
        runs = list(itertools.pairwise(ends))
        copies = [len({h // attention.group for h in range(a, b)}) for a, b in runs]
        times = [
            (2 * (b - a) + 2 * kv) / c for (a, b), kv, c in zip(runs, copies, exact, strict=True)
        ]
        return max(times), sum((t * t for t in times), Fraction(0)), sum(copies)

    cuts = itertools.combinations(range(1, attention.heads), world - 1)
    return min(key(stops) for stops in cuts)


@unhurried
@given(cases(most_heads=10))
def test_no_cut_is_better(case: tuple[ModelSpec, int, list[float] | None]) -> None:
    spec, world, capacity = case
    layout = make_layout(spec, world, capacity)
    slowest, squares, copies = reference_choice(spec.layers[0].attention, world, layout.capacity)
    exact = [Fraction(repr(c)) for c in layout.capacity]
    times = [cost / c for cost, c in zip(costs(layout), exact, strict=True)]
    assert max(times) == slowest
    assert sum(lengths(layout.layers[0].kv_heads)) == copies
    assert float(sum(t * t for t in times)) == pytest.approx(float(squares))


@unhurried
@given(cases())
def test_row_balance_bound(case: tuple[ModelSpec, int, list[float] | None]) -> None:
    spec, world, capacity = case
    layout = make_layout(spec, world, capacity)
    exact = [Fraction(repr(c)) for c in layout.capacity]
    for ranges, total in (
        (layout.vocabulary, spec.vocabulary),
        (layout.layers[0].channels, spec.layers[0].ffn.width),
    ):
        unit = min([64, *(owned.start & -owned.start for owned in ranges[1:])])
        shares = [total * c / sum(exact) for c in exact]
        for owned, share in zip(ranges, shares, strict=True):
            assert len(owned) < max(share + unit, Fraction(unit + 1))
            assert min(shares) < unit or len(owned) > share - unit


@unhurried
@given(cases())
def test_a_faster_rank_never_holds_fewer_rows(
    case: tuple[ModelSpec, int, list[float] | None],
) -> None:
    """But for the last rank, whose range ends where the axis does."""
    spec, world, capacity = case
    layout = make_layout(spec, world, capacity)
    for ranges in (layout.vocabulary, layout.layers[0].channels):
        speeds = zip(layout.capacity[:-1], lengths(ranges[:-1]), strict=True)
        held = [rows for _, rows in sorted(speeds)]
        assert held == sorted(held)


@unhurried
@given(cases(), st.sampled_from([0.5, 2, 3, 10]))
def test_capacities_are_relative(
    case: tuple[ModelSpec, int, list[float] | None], factor: float
) -> None:
    spec, world, _ = case
    capacity = [1 + rank % 3 for rank in range(world)]
    scaled = [c * factor for c in capacity]
    one, other = make_layout(spec, world, capacity), make_layout(spec, world, scaled)
    assert (one.layers, one.vocabulary) == (other.layers, other.vocabulary)


def test_decimal_fractions_are_taken_at_their_word() -> None:
    thirds, whole = (make_layout(model(64, 8), 2, c) for c in ((0.3, 0.1), (3, 1)))
    assert (thirds.layers, thirds.vocabulary) == (whole.layers, whole.vocabulary)


@unhurried
@given(st.integers(1, 24))
def test_equal_capacities_are_no_capacities(world: int) -> None:
    spec = model(24, 6)
    assert make_layout(spec, world, [7] * world).layers == make_layout(spec, world).layers


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world", "expected"),
    [
        (9, 3, 1, [9]),
        (9, 3, 2, [5, 4]),  # 14/12; whole groups, 6/3, would be 16/8
        (9, 3, 3, [3, 3, 3]),
        (9, 3, 4, [3, 3, 2, 1]),
        (9, 3, 9, [1] * 9),
        (14, 2, 2, [7, 7]),
        (14, 2, 4, [4, 3, 4, 3]),
        (7, 1, 3, [3, 2, 2]),
        (64, 8, 8, [8] * 8),
        (64, 8, 6, [11, 11, 10, 11, 11, 10]),
        (96, 96, 5, [20, 19, 19, 19, 19]),
    ],
)
def test_known_cuts(heads: int, kv_heads: int, world: int, expected: list[int]) -> None:
    assert lengths(make_layout(model(heads, kv_heads), world).layers[0].heads) == expected


def test_a_cut_group_has_its_kv_head_on_both_sides() -> None:
    assert make_layout(model(9, 3), 2).layers[0].kv_heads == (Range(0, 2), Range(1, 3))


def test_capacity_shifts_heads_channels_and_rows() -> None:
    layout = make_layout(model(32, 8, ffn=4096, vocabulary=32000), 3, (2, 1, 1))
    assert lengths(layout.layers[0].heads) == [16, 8, 8]
    assert lengths(layout.layers[0].channels) == [2048, 1024, 1024]
    assert lengths(layout.vocabulary) == [16000, 8000, 8000]
    assert layout.capacity == (2.0, 1.0, 1.0)


def test_ranges_begin_at_multiples_of_64() -> None:
    ranges = make_layout(model(64, 8, ffn=29568), 8).layers[0].channels
    assert all(owned.start % 64 == 0 for owned in ranges)
    assert lengths(ranges) == [3712] * 6 + [3648] * 2


@pytest.mark.parametrize(
    ("ffn", "world", "expected"),
    [
        (1536, 9, [192, 192, 192, 160, 160, 160, 160, 160, 160]),  # 171 each; in 16s 176 at most
        (256, 3, [96, 96, 64]),
        (96, 2, [48, 48]),  # 64 and 32 would be a third slower
    ],
)
def test_channels_stay_in_whole_blocks_of_32_up_to_a_quarter_slower(
    ffn: int, world: int, expected: list[int]
) -> None:
    assert lengths(make_layout(model(9, 3, ffn=ffn), world).layers[0].channels) == expected


@unhurried
@given(st.integers(1, 200), st.integers(1, 9), st.data())
def test_blocks_cost_a_quarter_at_most(blocks: int, world: int, data: st.DataObject) -> None:
    """And are kept wherever they cost no more: then every cut is a multiple of 32."""
    capacity = data.draw(st.lists(st.integers(1, 12), min_size=world, max_size=world))
    total = 32 * max(blocks, world)
    ranges = make_layout(model(9, 9, ffn=total), world, capacity).layers[0].channels

    def slowest(counts: Sequence[int]) -> Fraction:
        return max(Fraction(count, c) for count, c in zip(counts, capacity, strict=True))

    perfect = Fraction(total, sum(capacity))
    assert slowest(lengths(ranges)) <= Fraction(5, 4) * (perfect + 1)
    if all(32 * 4 * sum(capacity) <= total * c for c in capacity):
        assert all(owned.start % 32 == 0 for owned in ranges)


def test_alignment_gives_way_to_balance() -> None:
    """In units of 64 or 32 it would be 64 and 86, of 16 80 and 70; 72 and 78 is near enough."""
    assert lengths(make_layout(model(9, 3, ffn=150), 2).layers[0].channels) == [72, 78]


def test_layers_may_differ_and_equal_ones_share_their_split() -> None:
    wide, narrow = (8, 4, 256), (4, 4, 100)
    layout = make_layout(model(layers=[wide, narrow, wide]), 3)
    assert layout.layers[0] is layout.layers[2]
    assert lengths(layout.layers[0].heads) == [3, 3, 2]
    assert lengths(layout.layers[1].heads) == [2, 1, 1]
    with pytest.raises(IllegalSplit, match="4 attention heads over tensor_parallel=5"):
        make_layout(model(layers=[wide, narrow, wide]), 5)


@unhurried
@given(cases())
def test_owned_slices_cover_every_parameter(
    case: tuple[ModelSpec, int, list[float] | None],
) -> None:
    spec, world, capacity = case
    layout = make_layout(spec, world, capacity)
    for parameter in parameters(spec):
        whole = parameter.shape[parameter.axis]
        owned = [layout.owned(parameter, rank) for rank in range(world)]
        if parameter.cut is Cut.REPLICATED:
            assert owned == [Range(0, whole)] * world
        elif parameter.cut is Cut.KV_HEADS:
            assert {i for o in owned for i in range(o.start, o.stop)} == set(range(whole))
        else:
            assert_dealt(owned, whole)
        assert all(o.start % parameter.unit == 0 for o in owned)


@pytest.mark.parametrize(
    ("spec", "world", "message"),
    [
        (
            model(9, 3),
            12,
            "9 attention heads over tensor_parallel=12: at most 9 ranks can own a head; "
            "use tensor_parallel <= 9",
        ),
        (
            model(9, 3, ffn=4),
            5,
            "4 FFN channels over tensor_parallel=5: at most 4 ranks can own a channel; "
            "use tensor_parallel <= 4",
        ),
        (
            model(9, 3, vocabulary=2),
            3,
            "2 vocabulary rows over tensor_parallel=3: at most 2 ranks can own a row; "
            "use tensor_parallel <= 2",
        ),
        (
            model(9, 3),
            0,
            "9 attention heads over tensor_parallel=0: at least one rank must own them; "
            "use a tensor_parallel from 1 to 9",
        ),
    ],
)
def test_illegal_sizes_are_refused_with_the_legal_ones(
    spec: ModelSpec, world: int, message: str
) -> None:
    with pytest.raises(IllegalSplit) as refusal:
        make_layout(spec, world)
    assert str(refusal.value) == message


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_senseless_capacities_are_refused(bad: float) -> None:
    with pytest.raises(IllegalSplit, match=rf"capacity of rank 1 is {bad:g}: .* above 0"):
        make_layout(model(), 3, [1, bad, 1])


def test_a_capacity_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(IllegalSplit, match="capacity lists 2 ranks and tensor_parallel is 3"):
        make_layout(model(), 3, [2, 1])


def mixture(experts: int, width: int, shared: int | None = None) -> ModelSpec:
    spec = model()
    ffn = MixtureOfExperts(
        experts,
        FeedForward(width, "silu", gated=True, bias=True),
        Router(2),
        None if shared is None else FeedForward(shared, "silu", gated=True),
    )
    return replace(spec, layers=tuple(replace(layer, ffn=ffn) for layer in spec.layers))


@unhurried
@given(st.data())
def test_every_element_of_every_expert_lies_somewhere(data: st.DataObject) -> None:
    """Once, but for what every rank has a copy of."""
    world = data.draw(st.integers(1, 7))
    spec = mixture(data.draw(st.integers(7, 60)), data.draw(st.integers(7, 90)), shared=64)
    layout = make_layout(spec, world, expert_parallel=data.draw(st.booleans()))
    for parameter in parameters(spec):
        if parameter.expert is not None:
            owned = [layout.owned(parameter, rank) for rank in range(world)]
            held = sorted(row for run in owned for row in range(run.start, run.stop))
            assert held == list(range(parameter.shape[parameter.axis]))


def test_sixty_experts_over_seven_ranks() -> None:
    split = make_layout(mixture(60, 32), 7, expert_parallel=True).layers[0]
    assert lengths(split.experts) == [9, 9, 9, 9, 8, 8, 8]
    assert set(split.expert_channels) == {Range(0, 32)}


def test_experts_are_dealt_by_capacity() -> None:
    split = make_layout(mixture(8, 32), 3, (2, 1, 1), expert_parallel=True).layers[0]
    assert lengths(split.experts) == [4, 2, 2]


def test_sliced_experts_and_the_shared_one_are_cut_by_channels() -> None:
    split = make_layout(mixture(8, 96, shared=128), 2).layers[0]
    assert split.experts == (Range(0, 8),) * 2
    assert lengths(split.expert_channels) == [48, 48]
    assert lengths(split.channels) == [64, 64]


@pytest.mark.parametrize(
    ("expert_parallel", "message"),
    [
        (True, "3 experts over tensor_parallel=4: at most 3 ranks can own an expert"),
        (False, "2 channels of an expert over tensor_parallel=4: at most 2 ranks can own a"),
    ],
)
def test_too_few_experts_or_channels_are_refused(expert_parallel: bool, message: str) -> None:
    with pytest.raises(IllegalSplit, match=message):
        make_layout(mixture(3, 2), 4, expert_parallel=expert_parallel)
