"""SmolLM2 (or any model) through headwise at several sizes, beside `transformers`, in one run.

    python -m benchmarks.against_transformers --model path/to/model.gguf --sizes 1,2

Same weights in float32, same prompt ids, greedy, rounds interleaved, medians. Only one contender
computes at a time, and each may use every core. Prints a table and writes JSON if asked.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Protocol

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster import ClusterConfig, Engine
from cluster.ray_environment import prepare_local_ray
from cluster.request import Request, SamplingParams, Stopping

prepare_local_ray()
from cluster.shard_group import LocalRay  # noqa: E402 - reads that environment

GREEDY = SamplingParams(temperature=0.0)


class Contender(Protocol):
    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and per token after it."""
        ...


class Headwise:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._runs = 0

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self._runs += 1
        request = Request(
            f"run-{self._runs}-{time.monotonic_ns()}",
            tuple(prompt),
            GREEDY,
            Stopping(max_tokens=tokens, ignore_eos=True),
        )
        began = time.perf_counter()
        arrivals = [time.perf_counter() for event in self.engine.driver.submit(request)]
        return arrivals[0] - began, (arrivals[-1] - arrivals[0]) / (tokens - 1)

    def decode_phases(self, prompt: list[int], tokens: int) -> dict[str, float]:
        """Seconds per step of each of rank 0's phases, over one run."""
        loop = self.engine.driver.loop
        steps, before = loop.steps, loop.seconds
        self.run(prompt, tokens)
        count = loop.steps - steps
        return {
            phase: (getattr(loop.seconds, phase) - getattr(before, phase)) / count
            for phase in loop.seconds.__struct_fields__
        }

    def rss(self) -> dict[str, int]:
        processes = {f"rank {r.rank}": r.pid for r in self.engine.driver.ranks}
        return {name: psutil.Process(pid).memory_info().rss for name, pid in processes.items()}


class Transformers:
    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        source, options = (model, {})
        if model.suffix == ".gguf":
            source, options = model.parent, {"gguf_file": model.name}
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **options
        )

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        from transformers.generation.streamers import BaseStreamer

        arrivals: list[float] = []

        class Clock(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                arrivals.append(time.perf_counter())

            def end(self) -> None: ...

        began = time.perf_counter()
        self._model.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Clock(),
        )
        first, last = arrivals[1], arrivals[-1]  # the first call hands over the prompt
        return first - began, (last - first) / (tokens - 1)


def main(
    model: Annotated[Path, typer.Option()],
    sizes: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2",
    prompt_tokens: Annotated[int, typer.Option()] = 128,
    tokens: Annotated[int, typer.Option()] = 64,
    rounds: Annotated[int, typer.Option()] = 5,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Time to the first token and tokens per second, beside `transformers`."""
    prompt = [(17 * i) % 5000 + 100 for i in range(prompt_tokens)]
    start_seconds: dict[str, float] = {}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {"transformers": Transformers(model)}
        worlds = [int(size) for size in sizes.split(",")]
        stack.callback(LocalRay(sum(worlds)).stop)  # all are up, one computes
        for size in worlds:
            began = time.perf_counter()
            config = ClusterConfig.model_validate(
                {"model": str(model), "tensor_parallel": size, "kv_memory": "512MiB"}
            )
            name = f"headwise TP={size}"
            contenders[name] = Headwise(stack.enter_context(Engine(config)))
            start_seconds[name] = time.perf_counter() - began
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for contender in contenders.values():
            contender.run(prompt, 4)  # warm
        for shift in range(rounds):
            for name, contender in contenders.items():
                fresh = [(token + shift + 1) for token in prompt]  # no help from the prefix cache
                runs[name].append(contender.run(fresh, tokens))
        report = {
            "machine": {"processor": platform.processor(), "cpus": psutil.cpu_count()},
            "torch": torch.__version__,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "rounds": rounds,
            "contenders": {
                name: {
                    "ttft_s": statistics.median(first for first, _ in found),
                    "tokens_per_s": 1 / statistics.median(each for _, each in found),
                }
                for name, found in runs.items()
            },
            "start_s": start_seconds,
            "decode_phases_s": {
                name: contender.decode_phases([7], tokens)
                for name, contender in contenders.items()
                if isinstance(contender, Headwise)
            },
            "rss_bytes": {
                name: contender.rss()
                for name, contender in contenders.items()
                if isinstance(contender, Headwise)
            },
        }
    show(report)
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


def show(report: dict[str, Any]) -> None:
    table = Table("", "TTFT", "tokens/s", "x transformers", "all-reduce", title="decode, batch 1")
    base = report["contenders"]["transformers"]["tokens_per_s"]
    for name, found in report["contenders"].items():
        phases = report["decode_phases_s"].get(name)
        share = "" if phases is None else f"{phases['all_reduce'] / phases['total']:.0%} of a step"
        table.add_row(
            name,
            f"{found['ttft_s'] * 1e3:.0f} ms",
            f"{found['tokens_per_s']:.1f}",
            f"{found['tokens_per_s'] / base:.2f}",
            share,
        )
    Console().print(table)
    Console().print(report["decode_phases_s"], report["rss_bytes"], report["start_s"])


if __name__ == "__main__":
    typer.run(main)
