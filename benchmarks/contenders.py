"""Who is compared: headwise and `transformers`, on the same weights in float32, greedy."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from cluster import Engine
from cluster.request import Request, SamplingParams, Stopping
from shards.contract import PhaseSeconds

Prompts = list[list[int]]

_GREEDY = SamplingParams(temperature=0.0)
_NUMBERS = itertools.count()


class Contender(Protocol):
    def latency(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token of one stream, and per token after it."""
        ...

    def seconds(self, prompts: Prompts, tokens: int) -> float:
        """For `tokens` tokens after each prompt, all at once."""
        ...


class Headwise:
    def __init__(self, engine: Engine) -> None:
        self._driver = engine.driver

    def latency(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        stream = self._driver.submit(_request(prompt, tokens))
        arrivals = [time.perf_counter() for _ in stream]
        return arrivals[0] - began, (arrivals[-1] - arrivals[0]) / (tokens - 1)

    def seconds(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        for stream in [self._driver.submit(_request(prompt, tokens)) for prompt in prompts]:
            for _ in stream:
                pass
        return time.perf_counter() - began

    def phases(self, prompts: Prompts, tokens: int) -> dict[str, float]:
        """Of one run: seconds per step in each of rank 0's phases, the driver's wall time per step,
        and the share of it that rank 0 was at work (communication included)."""
        loop = self._driver.loop
        steps, before = loop.steps, loop.seconds
        wall = self.seconds(prompts, tokens)
        count = loop.steps - steps
        found = {
            phase: (getattr(loop.seconds, phase) - getattr(before, phase)) / count
            for phase in PhaseSeconds.__struct_fields__
        }
        return {**found, "wall": wall / count, "at_work": found["total"] * count / wall}

    def rss(self) -> dict[str, int]:
        ranks = self._driver.ranks
        return {f"rank {r.rank}": psutil.Process(r.pid).memory_info().rss for r in ranks}


class Transformers:
    """`generate`, batched where there are several prompts (of one length: no padding)."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        source, options = (model, {})
        if model.suffix == ".gguf":
            source, options = model.parent, {"gguf_file": model.name}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **options
        )

    def latency(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        arrivals: list[float] = []

        class Clock:
            def put(self, value: torch.Tensor) -> None:
                arrivals.append(time.perf_counter())

            def end(self) -> None: ...

        began = time.perf_counter()
        self._generate([prompt], tokens, streamer=Clock())
        first, last = arrivals[1], arrivals[-1]  # the first call hands over the prompt
        return first - began, (last - first) / (tokens - 1)

    def seconds(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        self._generate(prompts, tokens)
        return time.perf_counter() - began

    def _generate(self, prompts: Prompts, tokens: int, **options: Any) -> None:
        ids = torch.tensor(prompts)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            **options,
        )


class ContinuousBatching:
    """`transformers`' own continuous batching, of the model that `other` holds."""

    def __init__(self, other: Transformers) -> None:
        self._model = other.model

    def latency(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        seconds = self.seconds([prompt], tokens)
        return float("nan"), seconds / tokens

    def seconds(self, prompts: Prompts, tokens: int) -> float:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        outputs = self._model.generate_batch(inputs=prompts, generation_config=config)
        seconds = time.perf_counter() - began
        counts = [len(output.generated_tokens) for output in outputs.values()]
        if counts != [tokens] * len(prompts):
            raise RuntimeError(f"wanted {len(prompts)} answers of {tokens} tokens, got {counts}")
        return seconds


def _request(prompt: list[int], tokens: int) -> Request:
    stopping = Stopping(max_tokens=tokens, ignore_eos=True)
    return Request(f"run-{next(_NUMBERS)}", tuple(prompt), _GREEDY, stopping)
