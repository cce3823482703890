"""Dealing heads and rows to ranks of given whole weights (capacities): the rules and their bounds.

All functions return `world + 1` bounds: rank r gets `bounds[r]` up to `bounds[r + 1]`. They expect
at least as many heads, rows or things as there are ranks. A leaf: integers and fractions only.

Query heads: every rank gets a run of at least one, and a copy of each KV head that its run reads.
Its cost is what its slice of q, k, v and out weighs, in units of head_dim x width: 2 per query head
and 2 per KV head. Of all ways to cut, the one is taken whose slowest rank (cost / capacity) has
least to do; of those, the most even one (least sum of squares); of those, the one with the fewest
KV copies; of those, the one whose earlier ranks hold more.
Nine heads that read three KV heads are therefore cut 5/4 over two ranks (cost 14 and 12, one group
on both sides) and not 6/3 (16 and 8). Three ranks get 3/3/3, a whole group each.

    Bound: with m = max(1, ceil(heads * share)) for each rank's share of the capacity,
    max(cost / capacity) <= max over ranks of (2 m + 2 min(kv_heads, 1 + ceil((m - 1) / group)))
    / capacity. For the m of all ranks sum to at least `heads`, so that some cut gives no rank more
    than its m, and a run of m heads touches at most that many groups.

Channels and rows: dealt in units of a power of two up to 64, for the sake of vector loads, by
largest remainders. The unit is the largest that makes the slowest rank at most 1/16 slower than
single rows would; where rows come in blocks, and these divide the axis, a whole block may make it
1/4 slower. FFN channels do, since a quantised weight that is cut inside a block has to be widened.
The last range ends where the axis does, inside a unit if it must.

    Bound: a rank holds less than its exact share plus one unit, or one unit where that is more;
    where nobody's share is below one unit, it also holds more than its share minus one unit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

_WIDER_UNITS = (64, 32, 16, 8, 4, 2)
_SLOWER_AT_MOST = Fraction(17, 16)
_SLOWER_FOR_WHOLE_BLOCKS = Fraction(5, 4)


class _HeadCosts:
    """What runs of query heads cost, in halves: one per query head, one per KV head.

    A run [a, b) costs (b - a) + ((b - 1) // group - a // group + 1), which is
    `after[b] - before[a]`. Both grow, so how far a rank gets is a bisection.
    """

    def __init__(self, heads: int, kv_heads: int) -> None:
        self.heads = heads
        self.group = heads // kv_heads
        self.dearest = heads + kv_heads
        self._before = [a + a // self.group - 1 for a in range(heads + 1)]
        self._after = [b + (b - 1) // self.group for b in range(heads + 1)]

    def cost(self, start: int, stop: int) -> int:
        return self._after[stop] - self._before[start]

    def reach(self, start: int, budget: int) -> int:
        """The end of the longest run from `start` that costs `budget` at most."""
        return bisect_right(self._after, self._before[start] + budget) - 1


def deal_heads(heads: int, kv_heads: int, weights: Sequence[int]) -> list[int]:
    """The best runs of query heads, by this module's rule and order of preference.

    From the last rank to the first, `best[start]` is (sum of squares, cuts inside a group, -stop)
    of the best way for this rank and those behind it to own the heads from `start` on. Each cut
    inside a group is one more KV copy.
    """
    costs, world = _HeadCosts(heads, kv_heads), len(weights)
    scale = math.lcm(*weights)  # keeps the squares whole, so that ties are exact
    budgets = _least_budgets(costs, weights)
    best: dict[int, tuple[int, int, int]] = {heads: (0, 0, 0)}
    choices: list[dict[int, tuple[int, int, int]]] = []
    for rank in reversed(range(world)):
        behind, best = best, {}
        most = heads - (world - 1 - rank)
        for start in range(rank, most) if rank else (0,):
            ways = [
                (
                    behind[stop][0] + (costs.cost(start, stop) * (scale // weights[rank])) ** 2,
                    behind[stop][1] + (stop % costs.group != 0),
                    -stop,
                )
                for stop in range(start + 1, min(costs.reach(start, budgets[rank]), most) + 1)
                if stop in behind
            ]
            if ways:
                best[start] = min(ways)
        choices.append(best)
    bounds = [0]
    for choice in reversed(choices):
        bounds.append(-choice[bounds[-1]][2])
    return bounds


def _least_budgets(costs: _HeadCosts, weights: Sequence[int]) -> list[int]:
    """What each rank may spend in the least time in which all heads can be dealt.

    That time is cost / weight of some rank, for a whole cost of 2 or more. For each different
    weight, bisect over the costs that would still be an improvement.
    """

    def budgets(cost: int, weight: int) -> list[int]:
        return [cost * w // weight for w in weights]

    best_cost, best_weight = costs.dearest, min(weights)
    for weight in sorted(set(weights)):
        top = (best_cost * weight - 1) // best_weight
        if top < 2 or not _suffices(costs, budgets(top, weight)):
            continue
        low = 2
        while low < top:
            middle = (low + top) // 2
            if _suffices(costs, budgets(middle, weight)):
                top = middle
            else:
                low = middle + 1
        best_cost, best_weight = top, weight
    return budgets(best_cost, best_weight)


def _suffices(costs: _HeadCosts, budgets: Sequence[int]) -> bool:
    """Whether all heads can be dealt, one at least to each rank, within these budgets.

    Every rank goes as far as it can. Where that covers all heads, ranks can give heads back to
    those behind them, and a shorter run never costs more: nobody has to be empty.
    """
    stop = 0
    for budget in budgets:
        if budget < 2:
            return False
        stop = costs.reach(stop, budget)
    return stop == costs.heads


def deal_rows(rows: int, weights: Sequence[int], block: int = 1) -> list[int]:
    """Ranges in the largest unit that leaves the slowest rank nearly as fast as unit 1 would, with
    more patience for whole blocks of `block` rows (1 or a power of two up to 64)."""
    finest = _deal_units(rows, 1, weights)
    least = _slowest(finest, weights)
    for unit in _WIDER_UNITS:
        if -(-rows // unit) >= len(weights):
            dealt = _deal_units(rows, unit, weights)
            is_block = unit == block and rows % block == 0
            limit = _SLOWER_FOR_WHOLE_BLOCKS if is_block else _SLOWER_AT_MOST
            if _slowest(dealt, weights) <= limit * least:
                return dealt
    return finest


def deal_whole(things: int, weights: Sequence[int]) -> list[int]:
    """Ranges of things that come one by one, such as experts, by largest remainders."""
    return _deal_units(things, 1, weights)


def _slowest(bounds: Sequence[int], weights: Sequence[int]) -> Fraction:
    return max(
        Fraction(stop - start, weight)
        for (start, stop), weight in zip(pairwise(bounds), weights, strict=True)
    )


def _deal_units(rows: int, unit: int, weights: Sequence[int]) -> list[int]:
    """Largest remainders over whole units; ranks that would get none get one first.

    The last unit may be short. What it lacks is added to the last rank's quota, so that the
    shortage does not come on top of rounding down.
    """
    world, units = len(weights), -(-rows // unit)
    short = units - Fraction(rows, unit)
    single: set[int] = set()
    while True:
        others = [rank for rank in range(world) if rank not in single]
        pad = short if world - 1 in others else Fraction(0)
        share = (units - len(single) - pad) / sum(weights[rank] for rank in others)
        quota = {rank: weights[rank] * share for rank in others}
        if pad:
            quota[world - 1] += pad
        dealt = {rank: math.floor(q) for rank, q in quota.items()}
        left = units - len(single) - sum(dealt.values())
        for rank in sorted(others, key=lambda rank: dealt[rank] - quota[rank])[:left]:
            dealt[rank] += 1
        empty = {rank for rank in others if not dealt[rank]}
        if not empty:
            break
        single |= empty
    ends = accumulate(dealt.get(rank, 1) for rank in range(world))
    return [0, *(min(end * unit, rows) for end in ends)]
