"""`headwise serve`: one model copy on this machine, on a Ray of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from shards.errors import HeadwiseError

if TYPE_CHECKING:
    from deploy.args import AppArgs
    from deploy.start_report import Ready


class BadConfig(HeadwiseError):
    """Options or a config file that cannot be meant."""


def serve(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, GGUF file or hub id. [required]")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="What requests call the model, instead of its own name.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel",
            "--tp",
            "-n",
            help="Number of ranks. More than there are CPUs is slow, but right.",
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Relative speed of each rank, such as 2,1,1.")
    ] = None,
    expert_parallel: Annotated[
        bool | None,
        typer.Option(
            "--expert-parallel",
            help="Deal experts to ranks whole, instead of cutting each by its channels.",
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option()] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option()
    ] = None,
    quantization: Annotated[
        Literal["auto", "none", "int8", "int4"] | None,
        typer.Option(help="Of the weights; auto keeps GGUF blocks as they are."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where it is not the model's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    collective: Annotated[
        Literal["auto", "shared_memory", "gloo", "nccl", "symmetric_memory"] | None, typer.Option()
    ] = None,
    placement: Annotated[
        Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] | None, typer.Option()
    ] = None,
    cpus_per_rank: Annotated[
        float | None, typer.Option(help="Above 1, they must be there.")
    ] = None,
    threads_per_rank: Annotated[int | None, typer.Option()] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of a sequence at most.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="KV cache of each rank, such as 2GiB.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="That run at a time.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Computed in one step.")] = None,
    max_queued_requests: Annotated[int | None, typer.Option()] = None,
    max_queued_tokens: Annotated[int | None, typer.Option()] = None,
    start_timeout_s: Annotated[float | None, typer.Option()] = None,
    step_timeout_s: Annotated[float | None, typer.Option()] = None,
    recoveries: Annotated[
        int | None, typer.Option(help="How often in ten minutes lost ranks are replaced.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0 takes any free one.")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Of the OpenAI API; 0 takes any free one.")
    ] = None,
    http: Annotated[
        bool | None, typer.Option("--http/--no-http", help="Whether there is an OpenAI API.")
    ] = None,
    tls_certificate: Annotated[str | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file.")] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(help="PEM file; clients must show a certificate of it.")
    ] = None,
    tls_client_names: Annotated[
        str | None, typer.Option(help="Of client certificates that may call, such as a,b.")
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(help="Bearer tokens, one per line, NAME:TOKEN; calls must carry one."),
    ] = None,
    limits_file: Annotated[
        str | None, typer.Option(help="YAML: how much each caller may ask for.")
    ] = None,
    max_message_bytes: Annotated[int | None, typer.Option()] = None,
    max_connections: Annotated[int | None, typer.Option()] = None,
    max_streams_per_connection: Annotated[int | None, typer.Option()] = None,
    max_concurrent_calls: Annotated[int | None, typer.Option()] = None,
    max_connection_age_s: Annotated[
        float | None, typer.Option(help="When clients are asked to connect anew.")
    ] = None,
    max_connection_age_grace_s: Annotated[
        float | None, typer.Option(help="How long calls may go on after that.")
    ] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="How long running calls may go on after a signal.")
    ] = None,
    trace: Annotated[
        bool | None,
        typer.Option("--trace/--no-trace", help="Send OpenTelemetry spans, as OTEL_* say where."),
    ] = None,
    trace_steps: Annotated[
        int | None, typer.Option(help="One step in so many gets a span; 0 for none.")
    ] = None,
    log_format: Annotated[Literal["text", "json"] | None, typer.Option()] = None,
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None, typer.Option()
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON with these options' names; options win over it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Serve a model on this machine; prints one line when it is ready.

    SIGTERM and SIGINT end it in order. Defaults are those of ClusterConfig and ServerConfig.
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("config", "as_json")
    }
    args = read_args(config, given)

    from deploy.local import local_application
    from deploy.preflight import check
    from deploy.progress import shown_progress
    from deploy.signals import stop_signals

    with stop_signals() as stop, shown_progress() as show:
        show.phase("checking the model and the split")
        check(args.cluster, args.server)
        with local_application(args, show, stop) as application:
            show.stop()
            typer.echo((_as_json if as_json else _as_text)(application.ready))
            sys.stdout.flush()
            application.wait()


def read_args(config: Path | None, given: dict[str, Any]) -> AppArgs:
    """The options over the file over the defaults; raises `BadConfig` naming every fault."""
    from deploy.args import AppArgs, flattened

    try:
        args = AppArgs.model_validate({**flattened(_read(config)), **given})
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors(include_url=False))
        raise BadConfig(f"bad configuration: {faults}") from error
    if args.replicas != 1 or args.autoscaling is not None:
        asked = "autoscaling" if args.autoscaling is not None else f"replicas={args.replicas}"
        raise BadConfig(
            f"{asked}: `headwise serve` runs one copy of the model; deploy "
            "deploy.app:build on a Ray cluster for more"
        )
    return args


def _read(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"--config {config} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise BadConfig(f"--config {config} is neither YAML nor JSON: {cause}") from error
    if not isinstance(content, dict):
        raise BadConfig(f"--config {config} holds no mapping of option names to values")
    return content


def _fault(fault: Any) -> str:
    path = [str(part) for part in fault["loc"] if part not in ("cluster", "server")]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"--{path[-1].replace('_', '-')} is missing" if path else message
    if not path:
        return str(message)
    if fault["type"] == "extra_forbidden":
        return f"there is no option {path[-1]}"
    return f"{'.'.join(path)}={fault['input']!r}: {message[:1].lower()}{message[1:]}"


def _as_json(ready: Ready) -> str:
    return json.dumps({**ready.model_dump(mode="json"), "pid": os.getpid()})


def _as_text(ready: Ready) -> str:
    ranks = ", ".join(
        f"rank {rank.rank} heads {rank.heads[0]}-{rank.heads[1] - 1} "
        f"(KV {rank.kv_heads[0]}-{rank.kv_heads[1] - 1})"
        for rank in ready.ranks
    )
    http = f" and {ready.http} (OpenAI)" if ready.http else ""
    return (
        f"ready: {ready.model.name} at {ready.grpc} (gRPC){http}; {ranks}; "
        f"KV cache for {ready.kv_tokens:,} tokens"
    )
