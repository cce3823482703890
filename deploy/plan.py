"""`headwise plan`: how a model would be cut, what that costs and how fast it would be, before
anything is started.

Needs a config.json or a GGUF header, no weights and no torch: it answers in about a second for
models of any size.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from deploy.plan_device import device_of
from deploy.plan_prediction import Load, layouts_of, make_prediction
from deploy.plan_report import make_plan
from deploy.plan_view import print_plan
from shards.checkpoint.storage import load_stored
from shards.cost.device import ACCELERATORS, Device
from shards.cost.errors import CannotPredict
from shards.cost.host import HostProfile
from shards.cost.link import LINKS
from shards.cost.link import link as link_of
from shards.cost.objective import Objective
from shards.cost.precision import Precision
from shards.cost.prediction import STEP_TOKENS
from shards.errors import HeadwiseError
from shards.footprint import settle_dtype
from shards.layout import make_layout
from shards.models.spec import ModelSpec

# What people of one host, or one board with fast links, can choose from.
_SIZES = (1, 2, 4, 8)
_PROMPT, _OUTPUT = 512, 256


class OptionError(HeadwiseError, ValueError):
    """An option of `headwise plan` that cannot be read, or contradicts another."""


def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder, hub id, or GGUF file.")
    ],
    tensor_parallel: Annotated[
        int | None,
        typer.Option("--tensor-parallel", "--tp", "-n", help="Number of ranks.", show_default="1"),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(help="Relative speed of each rank, such as 2,1,1.", show_default="all equal"),
    ] = None,
    expert_parallel: Annotated[
        bool,
        typer.Option(
            "--expert-parallel",
            help="Deal experts to ranks whole, instead of cutting each by its channels.",
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    device: Annotated[
        str,
        typer.Option(
            help="What the ranks are: cpu (this host, as measured), cuda (any GPU; nothing is "
            f"predicted), {', '.join(ACCELERATORS)}."
        ),
    ] = "cpu",
    link: Annotated[
        str | None,
        typer.Option(help=f"Between ranks: {', '.join(LINKS)}.", show_default="the device's own"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Of hidden states, KV cache and weights that are not quantised; auto is the "
            "checkpoint's own."
        ),
    ] = "auto",
    quantization: Annotated[
        Literal["auto", "none", "int8", "int4", "fp8"],
        typer.Option(help="Of the weights; auto keeps the blocks of a GGUF file as they are."),
    ] = "auto",
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory of each rank's KV cache, such as 4GiB.")
    ] = None,
    memory_per_rank: Annotated[
        str | None, typer.Option(help="Memory of each rank for weights and KV cache together.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence, prompt included.", show_default="the model's"),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 16,
    batch: Annotated[str, typer.Option(help="Sequences at a time to predict for.")] = "1,8,32",
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt.", show_default=str(_PROMPT))
    ] = None,
    output: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens generated after it.", show_default=str(_OUTPUT)),
    ] = None,
    max_step_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step, as given to serve.")
    ] = STEP_TOKENS,
    ttft_slo: Annotated[
        float | None, typer.Option(help="Compare sizes: seconds to the first token, at most.")
    ] = None,
    itl_slo: Annotated[
        float | None, typer.Option(help="Compare sizes: seconds between tokens, at most.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes to compare.", show_default="1,2,4,8")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="First measure this host, which should be idle, and remember it."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how a model would be cut over ranks: heads, bytes, tokens that fit, communication; and
    predict latency and throughput on a device."""
    kv_bytes = _bytes("--kv-memory", kv_memory)
    rank_bytes = _bytes("--memory-per-rank", memory_per_rank)
    if kv_bytes is not None and rank_bytes is not None:
        raise OptionError(
            f"--kv-memory {kv_memory} and --memory-per-rank {memory_per_rank} exclude each "
            "other: give what is for the KV cache alone, or what is for it and the weights"
        )
    if measure and device != "cpu":
        raise OptionError(f"--measure with --device {device}: only this host's cpu is measured")
    speeds = _capacity(capacity)
    objective = _objective(ttft_slo, itl_slo)
    if objective != Objective() and speeds is not None:
        raise OptionError(
            f"--capacity {capacity} with --ttft-slo or --itl-slo: sizes are compared on equal "
            "ranks; leave one of them out"
        )
    spec, stored = load_stored(model, revision)
    if tensor_parallel is None:
        tensor_parallel = 1 if speeds is None else len(speeds)
    layout = make_layout(spec, tensor_parallel, speeds, expert_parallel=expert_parallel)
    precision = Precision(settle_dtype(dtype, spec), quantization, stored)

    prediction, unpredicted = None, None
    try:
        found = device_of(device, link, measure=measure)
    except CannotPredict as error:
        # The split needs no device: only who asked for more than it is refused.
        if device not in ("cpu", "cuda") or link is not None or objective != Objective():
            raise
        unpredicted = str(error)
    else:
        prediction = make_prediction(
            spec,
            layout,
            found,
            link_of(found.link if link is None else link),
            precision,
            _load(batch, prompt, output, max_step_tokens, spec),
            objective,
            layouts_of(spec, [*_sizes(sizes, found), tensor_parallel]),
        )
    report = make_plan(
        spec,
        layout,
        model=model,
        precision=precision,
        context=_context(context, spec),
        kv_memory=kv_bytes,
        memory_per_rank=rank_bytes,
        block_size=block_size,
        prediction=prediction,
        unpredicted=unpredicted,
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_plan(report)


def _load(
    batch: str, prompt: int | None, output: int | None, max_step_tokens: int, spec: ModelSpec
) -> Load:
    """The lengths that are not given are shortened to what the model's positions allow."""
    if prompt is None:
        prompt = max(1, min(_PROMPT, (spec.context - (output or 0)) // 2))
    if output is None:
        output = max(1, min(_OUTPUT, spec.context - prompt))
    if prompt + output > spec.context:
        raise OptionError(
            f"--prompt {prompt} and --output {output}: the model's positions end at "
            f"{spec.context}; give less of either"
        )
    return Load(_whole_numbers("--batch", batch), prompt, output, max_step_tokens)


def _sizes(value: str | None, device: Device) -> tuple[int, ...]:
    if value is not None:
        return _whole_numbers("--sizes", value)
    if isinstance(device, HostProfile) and device.shared:
        return tuple(size for size in _SIZES if size <= device.cores)
    return _SIZES


def _objective(ttft_s: float | None, itl_s: float | None) -> Objective:
    for option, value in (("--ttft-slo", ttft_s), ("--itl-slo", itl_s)):
        if value is not None and not value > 0:
            raise OptionError(f"{option} {value:g}: give seconds above 0, such as 0.05")
    return Objective(ttft_s, itl_s)


def _whole_numbers(option: str, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise OptionError(
            f"{option} {value}: give whole numbers above 0, separated by commas, such as 1,2,4"
        )
    return numbers


def _bytes(option: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        size = -1
    if size < 0:
        raise OptionError(f"{option} {value}: give a number of bytes with a unit, such as 4GiB")
    return size


def _capacity(value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise OptionError(
            f"--capacity {value}: give one number per rank, separated by commas, such as 2,1,1"
        ) from error


def _context(value: int | None, spec: ModelSpec) -> int:
    if value is None:
        return spec.context
    if not 1 <= value <= spec.context:
        raise OptionError(
            f"--context {value}: the model's positions end at {spec.context}; "
            f"use a --context from 1 to {spec.context}"
        )
    return value
