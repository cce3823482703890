"""The prediction of `headwise plan` for people: by batch, and by tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from deploy.plan_prediction import BatchPlan, PredictionPlan, SizePlan


def print_prediction(console: Console, plan: PredictionPlan, tensor_parallel: int) -> None:
    """The table by batch, and the one by size where there is an objective."""
    quantised = "" if plan.quantization == "none" else f", {plan.quantization} weights"
    linked = "" if tensor_parallel == 1 else f" over {plan.link}"
    ranks = "1 rank" if tensor_parallel == 1 else f"{tensor_parallel} ranks"
    console.print(
        f"predicted for {ranks} on {plan.devices} x {plan.device}{linked}{quantised}: prompts of "
        f"{plan.prompt:,} tokens, {plan.output:,} generated; room for {plan.kv_tokens:,} tokens of "
        "KV cache",
        soft_wrap=True,
    )
    console.print(_by_batch(plan))
    if plan.sizes:
        console.print(f"sizes that meet {_objective(plan)}, each with the most sequences that do")
        console.print(_by_size(plan))
        for line in _conclusion(plan):
            console.print(line, soft_wrap=True)


def _by_batch(plan: PredictionPlan) -> Table:
    table = _table("batch", *_NUMBERS, "memory", "compute", "all-reduce", "overhead", "KV cache")
    for at in plan.batches:
        table.add_row(
            str(at.batch),
            *_numbers(at),
            *(f"{share:.0%}" for share in at.decode_shares.values()),
            "fits" if at.fits else "too small",
        )
    return table


def _by_size(plan: PredictionPlan) -> Table:
    table = _table("ranks", "meets it", "batch", *_NUMBERS)
    for size in plan.sizes:
        name = f"{size.tensor_parallel}"
        table.add_row(
            f"* {name}" if size.tensor_parallel == plan.best else name,
            f"no: {', '.join(size.misses)}" if size.misses else "yes",
            str(size.at.batch),
            *_numbers(size.at),
        )
    return table


_NUMBERS = ("TTFT", "bound by", "ITL", "bound by", "tokens/s", "per device")


def _numbers(at: BatchPlan) -> tuple[str, ...]:
    return (
        _duration(at.ttft_s),
        at.prefill_bound,
        _duration(at.itl_s),
        at.decode_bound,
        f"{at.tokens_per_second:,.0f}",
        f"{at.tokens_per_second_per_device:,.0f}",
    )


def _conclusion(plan: PredictionPlan) -> Iterator[str]:
    chosen = next((size for size in plan.sizes if size.tensor_parallel == plan.best), None)
    if chosen is None:
        yield f"none of these sizes meets {_objective(plan)}: {_nearest(plan.sizes)}"
        return
    yield (
        f"best: tensor_parallel={chosen.tensor_parallel} with up to {chosen.at.batch} sequences at "
        f"a time, {chosen.at.tokens_per_second_per_device:,.0f} tokens/s per device"
    )


def _nearest(sizes: tuple[SizePlan, ...]) -> str:
    if all("memory" in size.misses for size in sizes):
        return "the model does not fit; use more ranks, a larger device, or quantised weights"
    fitting = [size for size in sizes if "memory" not in size.misses]
    ttft = min(size.at.ttft_s for size in fitting)
    itl = min(size.at.itl_s for size in fitting)
    return f"the least with one sequence is a TTFT of {_duration(ttft)}, an ITL of {_duration(itl)}"


def _objective(plan: PredictionPlan) -> str:
    limits = (("TTFT", plan.objective.ttft_s), ("ITL", plan.objective.itl_s))
    return " and ".join(f"{name} <= {_duration(s)}" for name, s in limits if s is not None)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _table(*columns: str) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
