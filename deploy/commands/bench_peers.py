"""`headwise bench peers`: other engines on the same machine, weights and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.bench.suite.errors import BenchmarkError
from deploy.commands.bench_suite import (
    OUTPUT,
    AsJson,
    Draw,
    KvMemory,
    Output,
    PromptTokens,
    Rounds,
    Seed,
    Tokens,
    check_plot,
    numbers,
    publish,
)


def peers(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="GGUF file, or folder. [required]")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", "--tp", "-n", min=1, help="Headwise's ranks.")
    ] = 2,
    threads_per_rank: Annotated[int, typer.Option(min=1, help="Headwise's.")] = 1,
    precisions: Annotated[str, typer.Option(help="Of the weights, alike for all.")] = (
        "float32,bfloat16,float16,int8,int4"
    ),
    streams: Annotated[str, typer.Option(help="Numbers of sequences side by side.")] = "1,8,32",
    prompt_tokens: PromptTokens = 128,
    tokens: Tokens = 128,
    prefill_tokens: Annotated[int, typer.Option(min=2, help="Prompt length of prefill.")] = 512,
    rounds: Rounds = 5,
    seed: Seed = 0,
    kv_memory: KvMemory = "1GiB",
    qwen_sized: Annotated[
        bool, typer.Option(help="Compare tensor parallelism on a model of Qwen2.5-0.5B's sizes.")
    ] = True,
    cache: Annotated[
        Path | None,
        typer.Option(help="For weights and peers.", show_default="~/.cache/headwise-peers"),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's programs.", show_default="CACHE/llama.cpp")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="vLLM's Python.", show_default="CACHE/vllm/bin/python")
    ] = None,
    build_llama_cpp: Annotated[
        Path | None, typer.Option(help="Build llama.cpp's programs in this folder, and end.")
    ] = None,
    output: Output = OUTPUT,
    plot: Draw = True,
    as_json: AsJson = False,
) -> None:
    """Headwise beside transformers, llama.cpp and vLLM: medians, ratios, the bars and a verdict.

    Peers that are not installed are left out. Decode of one stream is on an empty context, as
    llama-bench's tg; of several after --prompt-tokens each, as llama-batched-bench's S_TG.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if build_llama_cpp is not None:
        from deploy.bench.peers.build_llama_cpp import build_llama_cpp as build

        build(build_llama_cpp, console.print)
        return
    if model is None:
        raise BenchmarkError("--model is missing: give a GGUF file, or a folder")
    counts = numbers("--streams", streams)
    check_plot(plot)
    from deploy.bench.peers.compare import compare
    from deploy.bench.peers.settings import CACHE, Settings

    cache = cache or CACHE
    settings = Settings(
        model=model,
        ranks=tensor_parallel,
        threads=threads_per_rank,
        precisions=tuple(part.strip() for part in precisions.split(",")),
        streams=counts,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        prefill_tokens=prefill_tokens,
        rounds=rounds,
        seed=seed,
        kv_memory=kv_memory,
        qwen_sized=qwen_sized,
        cache=cache,
        llama_cpp=llama_cpp or cache / "llama.cpp",
        vllm_python=vllm_python or cache / "vllm" / "bin" / "python",
    )
    publish(compare(settings, console.print), output, plot, as_json)
