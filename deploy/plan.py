"""`headwise plan`: how a model would be cut, and what that costs, before anything is started.

Needs a config.json or a GGUF header, no weights and no torch: it answers in about a second for
models of any size.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from deploy.plan_report import make_plan
from deploy.plan_view import print_plan
from shards.errors import HeadwiseError
from shards.footprint import settle_dtype
from shards.layout import make_layout
from shards.models.source import load_spec
from shards.models.spec import ModelSpec


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
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What the ranks are.")] = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Of weights, KV cache and hidden states; auto is the checkpoint's own on cuda, "
            "float32 on cpu."
        ),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how a model would be cut over ranks: heads, bytes, tokens that fit, communication."""
    kv_bytes = _bytes("--kv-memory", kv_memory)
    rank_bytes = _bytes("--memory-per-rank", memory_per_rank)
    if kv_bytes is not None and rank_bytes is not None:
        raise OptionError(
            f"--kv-memory {kv_memory} and --memory-per-rank {memory_per_rank} exclude each "
            "other: give what is for the KV cache alone, or what is for it and the weights"
        )
    speeds = _capacity(capacity)
    spec = load_spec(model, revision)
    if tensor_parallel is None:
        tensor_parallel = 1 if speeds is None else len(speeds)
    report = make_plan(
        spec,
        make_layout(spec, tensor_parallel, speeds),
        model=model,
        dtype=settle_dtype(dtype, spec, device),
        context=_context(context, spec),
        kv_memory=kv_bytes,
        memory_per_rank=rank_bytes,
        block_size=block_size,
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_plan(report)


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
