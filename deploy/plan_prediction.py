"""What `headwise plan` predicts of a split on a device, as data: part of what `--json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from shards.cost.device import Device
from shards.cost.link import Link
from shards.cost.objective import Candidate, Miss, Objective, best, candidates
from shards.cost.precision import Precision
from shards.cost.prediction import CostModel, Prediction
from shards.cost.step import Bound
from shards.errors import IllegalSplit
from shards.layout import Layout, make_layout
from shards.models.spec import ModelSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchPlan(_Frozen):
    """`batch` sequences at a time. Seconds; `decode_shares` is where the time between tokens goes,
    `decode_bound` and `prefill_bound` what most of each goes to. `fits`: the KV cache holds them
    all."""

    batch: int
    ttft_s: float
    itl_s: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    decode_shares: dict[Bound, float]
    decode_bound: Bound
    prefill_bound: Bound
    fits: bool


class SizePlan(_Frozen):
    """One tensor-parallel size with the most sequences at a time that meet the objective, or with a
    single one where `misses` says what that falls short in."""

    tensor_parallel: int
    misses: tuple[Miss, ...]
    at: BatchPlan


class PredictionPlan(_Frozen):
    """`context` is what each sequence has in the KV cache halfway through its output; `kv_tokens`
    what the group's KV caches hold on this device, 0 where the weights do not fit. `sizes` is empty
    without an objective; `best` is the size that generates most per device among those that meet
    it, None where none does."""

    device: str
    devices: int
    link: str
    quantization: str
    prompt: int
    output: int
    context: int
    max_step_tokens: int
    kv_tokens: int
    batches: tuple[BatchPlan, ...]
    objective: Objective
    sizes: tuple[SizePlan, ...]
    best: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """What the prediction is asked for: `batches` of sequences of `prompt` tokens that generate
    `output` more, in steps of at most `max_step_tokens`."""

    batches: tuple[int, ...]
    prompt: int
    output: int
    max_step_tokens: int

    @property
    def context(self) -> int:
        """Tokens of a sequence halfway through its output."""
        return self.prompt + self.output // 2


def make_prediction(
    spec: ModelSpec,
    layout: Layout,
    device: Device,
    link: Link,
    precision: Precision,
    load: Load,
    objective: Objective,
    layouts: Sequence[Layout],
) -> PredictionPlan:
    """Of `layout`, and with an objective of the `layouts` that are compared for it.

    Raises `CannotPredict` where the device has no arithmetic for `precision`.
    """
    model = CostModel(spec, layout, device, link, precision, load.max_step_tokens)
    compared: tuple[Candidate, ...] = ()
    if objective != Objective():
        compared = candidates(
            spec,
            layouts,
            device,
            link,
            precision,
            objective,
            prompt=load.prompt,
            context=load.context,
            step_tokens=load.max_step_tokens,
        )
    chosen = best(compared)
    return PredictionPlan(
        device=device.name,
        devices=device.devices(layout.world),
        link=link.name,
        quantization=precision.quantization,
        prompt=load.prompt,
        output=load.output,
        context=load.context,
        max_step_tokens=load.max_step_tokens,
        kv_tokens=model.kv_tokens,
        batches=tuple(
            _batch(model.predict(batch, load.prompt, load.context)) for batch in load.batches
        ),
        objective=objective,
        sizes=tuple(
            SizePlan(
                tensor_parallel=each.tensor_parallel,
                misses=each.misses,
                at=_batch(each.prediction),
            )
            for each in compared
        ),
        best=None if chosen is None else chosen.tensor_parallel,
    )


def layouts_of(spec: ModelSpec, sizes: Sequence[int]) -> tuple[Layout, ...]:
    """Even cuts over each of `sizes` ranks; sizes over which the model cannot be cut are left
    out."""
    layouts = []
    for size in sorted(set(sizes)):
        try:
            layouts.append(make_layout(spec, size))
        except IllegalSplit:
            continue
    return tuple(layouts)


def _batch(prediction: Prediction) -> BatchPlan:
    return BatchPlan(
        batch=prediction.batch,
        ttft_s=prediction.ttft_s,
        itl_s=prediction.itl_s,
        tokens_per_second=prediction.tokens_per_second,
        tokens_per_second_per_device=prediction.tokens_per_second_per_device,
        decode_shares=prediction.decode.shares,
        decode_bound=prediction.decode.bound,
        prefill_bound=prediction.prefill.bound,
        fits=prediction.fits,
    )
