"""What is measured of every engine alike, and how engines are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

EngineName = Literal["headwise", "llama.cpp", "transformers", "vLLM", "roofline"]
"""`roofline` is no engine, but the limit that memory sets to all of them."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of `tokens` tokens, to the first token after it; nothing else runs."""

    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.tokens}"


@dataclass(frozen=True, slots=True)
class Decode:
    """`streams` sequences decode side by side after prompts of `prompt_tokens` each; measured over
    `tokens` steps, without prefill. A prompt of one token stands for an empty context."""

    streams: int
    prompt_tokens: int
    tokens: int

    def __str__(self) -> str:
        return f"decode x{self.streams}"


Workload = Prefill | Decode


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine with a model, ready to be measured. `precision` is a key of `PRECISIONS`,
    `threads` is per rank."""

    engine: EngineName
    model: str
    precision: str
    ranks: int
    threads: int

    def __str__(self) -> str:
        cut = f" TP={self.ranks}" if self.ranks > 1 else ""
        return f"{self.engine}{cut}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True, slots=True)
class Point:
    """One number of the comparison: tokens per second, of all streams together."""

    setup: Setup
    workload: Workload


class Contender(Protocol):
    """A started engine. While it is not asked it takes no core."""

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        """Tokens computed (prefill) or generated (decode) per second; prompts are random, drawn
        from `seed`. Raises `BenchmarkError` where the engine cannot."""
        ...
