"""Which tensor-parallel size meets a service-level objective, and makes the most of its devices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shards.cost.device import Device
from shards.cost.link import Link
from shards.cost.precision import Precision
from shards.cost.prediction import STEP_TOKENS, CostModel, Prediction
from shards.layout import Layout
from shards.models.spec import ModelSpec

Miss = Literal["memory", "ttft", "itl"]


@dataclass(frozen=True, slots=True)
class Objective:
    """Seconds, each at most; None is no limit."""

    ttft_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A size, the most sequences at a time with which it meets the objective, and what they get.

    Where it does not meet it with a single one, `prediction` is of that one and `misses` says what
    stands in the way.
    """

    tensor_parallel: int
    prediction: Prediction
    misses: tuple[Miss, ...]

    @property
    def meets(self) -> bool:
        return not self.misses


def candidates(
    spec: ModelSpec,
    layouts: Iterable[Layout],
    device: Device,
    link: Link | None,
    precision: Precision,
    objective: Objective,
    *,
    prompt: int,
    context: int,
    step_tokens: int = STEP_TOKENS,
) -> tuple[Candidate, ...]:
    """One for each layout, in that order; lengths as in `predict`."""
    found = []
    for layout in layouts:
        model = CostModel(spec, layout, device, link, precision, step_tokens)

        def misses(batch: int, model: CostModel = model) -> tuple[Miss, ...]:
            return _misses(model, objective, batch, prompt, context)

        # More sequences never make a step shorter, nor leave more memory.
        batches = range(1, step_tokens + 1)
        most = bisect_left(batches, True, key=lambda batch: bool(misses(batch)))
        batch = max(1, most)
        found.append(Candidate(layout.world, model.predict(batch, prompt, context), misses(batch)))
    return tuple(found)


def best(found: Sequence[Candidate]) -> Candidate | None:
    """Of those that meet the objective, the one that generates most per device; the smallest of
    equals. None where none does."""
    meeting = [candidate for candidate in found if candidate.meets]
    return max(
        meeting,
        key=lambda c: (c.prediction.tokens_per_second_per_device, -c.tensor_parallel),
        default=None,
    )


def _misses(
    model: CostModel, objective: Objective, batch: int, prompt: int, context: int
) -> tuple[Miss, ...]:
    missed: list[Miss] = []
    if batch * context > model.kv_tokens:
        missed.append("memory")
    if objective.itl_s is not None and model.decode(batch, context).total_s > objective.itl_s:
        missed.append("itl")
    if (
        objective.ttft_s is not None
        and model.prefill(batch, prompt, context).total_s > objective.ttft_s
    ):
        missed.append("ttft")
    return tuple(missed)
