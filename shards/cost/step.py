"""How long a step takes: each call by the roofline, each exchange by the link."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shards.cost.device import Rates
from shards.cost.errors import CannotPredict
from shards.cost.link import Link
from shards.cost.work import Phase, Work

Bound = Literal["memory", "compute", "all-reduce", "overhead"]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds by what they are spent on: calls bound by memory and by arithmetic, the exchanges
    between ranks, and what launches and the host take. Of the slowest rank in each phase."""

    memory_s: float = 0.0
    compute_s: float = 0.0
    all_reduce_s: float = 0.0
    overhead_s: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(
            self.memory_s + other.memory_s,
            self.compute_s + other.compute_s,
            self.all_reduce_s + other.all_reduce_s,
            self.overhead_s + other.overhead_s,
        )

    def __mul__(self, times: int) -> StepTime:
        return StepTime(
            self.memory_s * times,
            self.compute_s * times,
            self.all_reduce_s * times,
            self.overhead_s * times,
        )

    @property
    def total_s(self) -> float:
        return self.memory_s + self.compute_s + self.all_reduce_s + self.overhead_s

    @property
    def shares(self) -> dict[Bound, float]:
        """Of the total."""
        total = self.total_s
        return {
            "memory": self.memory_s / total,
            "compute": self.compute_s / total,
            "all-reduce": self.all_reduce_s / total,
            "overhead": self.overhead_s / total,
        }

    @property
    def bound(self) -> Bound:
        """What most of the time is spent on."""
        shares = self.shares
        return max(shares, key=lambda name: shares[name])


def step_time(
    phases: Iterable[Phase], ranks: Sequence[Rates], link: Link, step_s: float
) -> StepTime:
    """The phases one after the other; ranks[r] runs rank r's calls.

    Raises `CannotPredict` where a device has no arithmetic of a format.
    """
    total = StepTime(overhead_s=step_s)
    for phase in phases:
        slowest = max(
            (_calls(calls, rates) for calls, rates in zip(phase.ranks, ranks, strict=False)),
            key=lambda time: time.total_s,
        )
        exchange = 0.0
        if phase.all_reduce_bytes:
            exchange = link.all_reduce_s(len(ranks), phase.all_reduce_bytes)
        elif phase.gather_bytes:
            # The sampled tokens' ids go back in one more message.
            exchange = link.gather_s(len(ranks), phase.gather_bytes) + link.gather_s(len(ranks), 0)
        total += (slowest + StepTime(all_reduce_s=exchange)) * phase.times
    return total


def _calls(calls: Iterable[Work], rates: Rates) -> StepTime:
    memory, compute, overhead = 0.0, 0.0, 0.0
    for call in calls:
        moving = call.streamed / rates.bandwidth
        computing = call.operations / _rate(call, rates)
        if moving >= computing:
            memory += moving
        else:
            compute += computing
        overhead += rates.call_s
    return StepTime(memory, compute, 0.0, overhead)


def _rate(call: Work, rates: Rates) -> float:
    if call.arithmetic not in rates.operations:
        raise CannotPredict(
            f"the device has no {call.arithmetic} arithmetic: it has {', '.join(rates.operations)}"
        )
    rate = rates.operations[call.arithmetic]
    return rate if call.rows is None else rate * call.rows / (call.rows + rates.half_rows)
