"""`headwise bench latency`, `throughput`, `scaling`, `roofline`, `perplexity`, `collectives`:
engines that are started for the purpose, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deploy.bench.suite.errors import BenchmarkError

if TYPE_CHECKING:
    from deploy.bench.suite.engines import EngineOptions
    from deploy.bench.suite.result import Result

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, GGUF file or hub id.")]
Ranks = Annotated[
    int, typer.Option("--tensor-parallel", "--tp", "-n", min=1, help="Number of ranks.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of each rank.", show_default="as many as it is due")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="What the ranks are.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of all that is not quantised."),
]
Quantization = Annotated[
    Literal["auto", "none", "int8", "int4"],
    typer.Option(help="Of the weights; auto is as the checkpoint has them."),
]
KvMemory = Annotated[str, typer.Option(help="KV cache of each rank.")]
Batches = Annotated[str, typer.Option(help="Numbers of sequences that decode side by side.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Of each prompt.")]
Tokens = Annotated[int, typer.Option(min=1, help="Decoded after each prompt.")]
Rounds = Annotated[int, typer.Option(min=1, help="Samples of everything.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the prompts.")]
Output = Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and SVG files.")]
Draw = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw SVG plots (matplotlib).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")]

OUTPUT = Path("bench-results")


def latency(
    model: Model,
    tensor_parallel: Ranks = 1,
    threads_per_rank: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    kv_memory: KvMemory = "1GiB",
    prompts: Annotated[str, typer.Option(help="Prompt lengths; the first is decode's.")] = (
        "32,128,512"
    ),
    batches: Batches = "1,2,4,8,16,32",
    tokens: Tokens = 64,
    rounds: Rounds = 5,
    seed: Seed = 0,
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """Time to first token by prompt length, and between tokens by batch."""
    options = _options(
        model, tensor_parallel, threads_per_rank, device, dtype, quantization, kv_memory
    )
    lengths, counts = numbers("--prompts", prompts), numbers("--batches", batches)
    check_plot(plot)
    from deploy.bench.suite.latency import measure_latency

    result = measure_latency(
        options, prompts=lengths, batches=counts, tokens=tokens, rounds=rounds, seed=seed
    )
    publish(result, output, plot, as_json)


def throughput(
    model: Model,
    tensor_parallel: Ranks = 1,
    threads_per_rank: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    kv_memory: KvMemory = "1GiB",
    requests: Annotated[str, typer.Option(help="Numbers of requests sent at once.")] = "1,8,32",
    prompt_tokens: PromptTokens = 128,
    tokens: Tokens = 128,
    rounds: Rounds = 3,
    seed: Seed = 0,
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """Tokens per second when there is always work, prefill included."""
    options = _options(
        model, tensor_parallel, threads_per_rank, device, dtype, quantization, kv_memory
    )
    counts = numbers("--requests", requests)
    check_plot(plot)
    from deploy.bench.suite.throughput import measure_throughput

    result = measure_throughput(
        options,
        batches=counts,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        rounds=rounds,
        seed=seed,
    )
    publish(result, output, plot, as_json)


def scaling(
    model: Model,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    kv_memory: KvMemory = "1GiB",
    sizes: Annotated[
        str | None, typer.Option(help="Numbers of ranks.", show_default="1,2,4.. of all devices")
    ] = None,
    batches: Batches = "1,8",
    prompt_tokens: PromptTokens = 128,
    tokens: Tokens = 64,
    rounds: Rounds = 3,
    seed: Seed = 0,
    predict_for: Annotated[
        str, typer.Option(help="Device of the predictions: cpu as measured, or such as h100-sxm.")
    ] = "cpu",
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """Strong and weak scaling over ranks, beside the cost model's prediction."""
    options = _options(model, 1, None, device, dtype, quantization, kv_memory)
    counts = numbers("--batches", batches)
    ranks = None if sizes is None else numbers("--sizes", sizes)
    check_plot(plot)
    from deploy.bench.suite.scaling import measure_scaling

    result = measure_scaling(
        options,
        sizes=ranks,
        batches=counts,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        rounds=rounds,
        seed=seed,
        device=predict_for,
    )
    publish(result, output, plot, as_json)


def roofline(
    model: Model,
    tensor_parallel: Ranks = 1,
    threads_per_rank: Threads = None,
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    kv_memory: KvMemory = "1GiB",
    batches: Batches = "1,8,32",
    prompt_tokens: PromptTokens = 1,
    tokens: Tokens = 64,
    rounds: Rounds = 5,
    seed: Seed = 0,
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """This machine's memory bandwidth and flops, the limit they set, and the share reached."""
    options = _options(
        model, tensor_parallel, threads_per_rank, "cpu", dtype, quantization, kv_memory
    )
    counts = numbers("--batches", batches)
    check_plot(plot)
    from deploy.bench.suite.roofline import measure_roofline

    result = measure_roofline(
        options,
        batches=counts,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        rounds=rounds,
        seed=seed,
    )
    publish(result, output, plot, as_json)


def perplexity(
    model: Model,
    text: Annotated[
        Path, typer.Option(help="A text file.", exists=True, dir_okay=False, readable=True)
    ],
    tensor_parallel: Ranks = 1,
    threads_per_rank: Threads = None,
    kv_memory: KvMemory = "1GiB",
    output: Output = OUTPUT,
    as_json: AsJson = False,
) -> None:
    """What each dtype and quantisation costs in accuracy: perplexity of a text."""
    options = _options(model, tensor_parallel, threads_per_rank, "cpu", "auto", "auto", kv_memory)
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"--text={text}: no UTF-8 at byte {error.start}") from error
    from deploy.bench.suite.perplexity import measure_perplexity

    publish(measure_perplexity(options, words), output, False, as_json)


def collectives(
    ranks: Annotated[int, typer.Option(min=2, help="On this host.")] = 2,
    transports: Annotated[str, typer.Option(help="What to compare.")] = "shared_memory,gloo",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    calls: Annotated[int, typer.Option(min=1, help="Of each size and transport.")] = 400,
    rounds: Rounds = 4,
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """Latency and bandwidth of an all-reduce between ranks of this host, by message size."""
    check_plot(plot)
    from deploy.bench.suite.collectives import Sweep, measure_collectives

    names = tuple(name.strip() for name in transports.split(","))
    sweep = Sweep(ranks, names, dtype, calls, rounds)
    publish(measure_collectives(sweep), output, plot, as_json)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,8,32`, ascending and without doubles; `BenchmarkError` naming `option` for all else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise BenchmarkError(f"{option}={text}: give numbers from 1, such as 1,8,32")
    return tuple(sorted({int(part) for part in parts}))


def check_plot(plot: bool) -> None:
    """What would fail after minutes of measuring fails before."""
    if plot:
        from deploy.bench.suite.plot import require_matplotlib

        require_matplotlib()


def publish(result: Result, output: Path, plot: bool, as_json: bool) -> None:
    """Print the result, and write its files."""
    from rich.console import Console
    from rich.markdown import Markdown

    from deploy.bench.suite.output import write

    if as_json:
        typer.echo(result.model_dump_json())
    else:
        Console().print(Markdown(result.markdown()))
    for path in write(result, output, plots=plot):
        typer.echo(f"wrote {path}", err=True)


def _options(
    model: str,
    tensor_parallel: int,
    threads_per_rank: int | None,
    device: str,
    dtype: str,
    quantization: str,
    kv_memory: str,
) -> EngineOptions:
    from deploy.bench.suite.engines import EngineOptions

    options = EngineOptions(
        model=model,
        tensor_parallel=tensor_parallel,
        threads_per_rank=threads_per_rank,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_memory=kv_memory,
    )
    options.config()  # what cannot be meant is refused before anything is measured
    return options
