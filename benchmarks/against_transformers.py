"""One model through headwise at several sizes, beside `transformers`, in one run.

    python -m benchmarks.against_transformers --model path/to/model.gguf --sizes 1,2

Same weights in float32, same prompt ids, greedy, rounds interleaved, medians. One contender
computes at a time and may use every core. Prompts differ from round to round, so that no prefix
cache helps. Prints tables, and writes JSON if asked.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import Contender, ContinuousBatching, Headwise, Prompts, Transformers
from cluster import ClusterConfig, Engine
from cluster.ray_environment import prepare_local_ray


def main(
    model: Annotated[Path, typer.Option()],
    sizes: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2",
    streams: Annotated[str, typer.Option(help="Numbers of prompts at a time.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option()] = 128,
    tokens: Annotated[int, typer.Option(help="Generated after each prompt.")] = 64,
    rounds: Annotated[int, typer.Option()] = 3,
    continuous: Annotated[
        bool, typer.Option(help="transformers' continuous batching too; minutes on a CPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """TTFT, tokens per second and where the time goes, beside `transformers`."""
    prepare_local_ray()
    from cluster.shard_group import LocalRay

    worlds = [int(size) for size in sizes.split(",")]
    batches = [int(count) for count in streams.split(",")]
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor(), "cpus": psutil.cpu_count()},
        "torch": torch.__version__,
        "model": model.name,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "rounds": rounds,
        "start_s": {},
    }
    with ExitStack() as stack:
        transformers = Transformers(model)
        contenders: dict[str, Contender] = {"transformers": transformers}
        if continuous:
            contenders["transformers, continuous"] = ContinuousBatching(transformers)
        stack.callback(LocalRay(sum(worlds)).stop)  # all are up, one computes
        for world in worlds:
            name = f"headwise TP={world}"
            config = {"model": str(model), "tensor_parallel": world, "kv_memory": "512MiB"}
            began = time.perf_counter()
            engine = stack.enter_context(Engine(ClusterConfig.model_validate(config)))
            report["start_s"][name] = time.perf_counter() - began
            contenders[name] = Headwise(engine)
        for contender in contenders.values():
            contender.seconds(_prompts(1, prompt_tokens, seed=0), 4)  # warm
        report["latency"] = _latency(contenders, prompt_tokens, tokens, rounds)
        report["throughput"] = {
            str(count): _throughput(contenders, count, prompt_tokens, tokens, rounds)
            for count in batches
        }
        ours = {name: c for name, c in contenders.items() if isinstance(c, Headwise)}
        report["phases_s"] = {
            f"{name}, {count} streams": c.phases(_prompts(count, 8, seed=9), tokens)
            for name, c in ours.items()
            for count in batches
        }
        report["rss_bytes"] = {name: c.rss() for name, c in ours.items()}
    _show(report)
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


def _prompts(count: int, length: int, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    prompts: Prompts = torch.randint(100, 5000, (count, length), generator=generator).tolist()
    return prompts


def _latency(
    contenders: dict[str, Contender], prompt_tokens: int, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        [prompt] = _prompts(1, prompt_tokens, seed=number + 1)
        for name, contender in contenders.items():
            runs[name].append(contender.latency(prompt, tokens))
    return {
        name: {
            "ttft_s": statistics.median(first for first, _ in found),
            "tokens_per_s": 1 / statistics.median(each for _, each in found),
        }
        for name, found in runs.items()
    }


def _throughput(
    contenders: dict[str, Contender], count: int, prompt_tokens: int, tokens: int, rounds: int
) -> dict[str, float]:
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        prompts = _prompts(count, prompt_tokens, seed=100 * count + number)
        for name, contender in contenders.items():
            runs[name].append(contender.seconds(prompts, tokens))
    return {name: count * tokens / statistics.median(found) for name, found in runs.items()}


def _show(report: dict[str, Any]) -> None:
    console = Console()
    latency = Table("one stream", "TTFT", "tokens/s", "x transformers")
    base = report["latency"]["transformers"]["tokens_per_s"]
    for name, found in report["latency"].items():
        rate = found["tokens_per_s"]
        latency.add_row(
            name, f"{found['ttft_s'] * 1e3:.0f} ms", f"{rate:.1f}", f"{rate / base:.2f}"
        )
    counts = list(report["throughput"])
    throughput = Table("tokens/s, prefill included", *(f"{count} streams" for count in counts))
    for name in report["latency"]:
        cells = []
        for count in counts:
            found = report["throughput"][count]
            cells.append(f"{found[name]:.1f} ({found[name] / found['transformers']:.2f}x)")
        throughput.add_row(name, *cells)
    phases = Table("ms per step", *next(iter(report["phases_s"].values())))
    for name, found in report["phases_s"].items():
        *spent, at_work = found.values()
        phases.add_row(name, *(f"{seconds * 1e3:.1f}" for seconds in spent), f"{at_work:.0%}")
    memory = Table("resident", "bytes")
    for name, ranks in report["rss_bytes"].items():
        for rank, rss in ranks.items():
            memory.add_row(f"{name}, {rank}", f"{rss / 1e6:.0f} MB")
    for table in (latency, throughput, phases, memory):
        console.print(table)
    console.print({name: f"start {seconds:.1f} s" for name, seconds in report["start_s"].items()})


if __name__ == "__main__":
    typer.run(main)
