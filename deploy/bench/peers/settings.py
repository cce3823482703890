"""What `headwise bench peers` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs

from deploy.bench.peers.weights import PRECISIONS
from deploy.bench.suite.errors import BenchmarkError

CACHE = platformdirs.user_cache_path("headwise-peers")
"""Where peers are looked for, and where the weights made for them are kept."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`streams` begin with 1. `llama_cpp` and `vllm_python` may not exist: those peers are then
    left out, with a note. `qwen_sized` adds the comparison of tensor parallelism on that model."""

    model: Path
    ranks: int
    threads: int
    precisions: tuple[str, ...]
    streams: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    prefill_tokens: int
    rounds: int
    seed: int
    kv_memory: str
    qwen_sized: bool
    cache: Path
    llama_cpp: Path
    vllm_python: Path

    def __post_init__(self) -> None:
        unknown = set(self.precisions) - set(PRECISIONS)
        if unknown:
            raise BenchmarkError(
                f"--precisions {', '.join(sorted(unknown))}: use some of {', '.join(PRECISIONS)}"
            )
        if self.streams[:1] != (1,) or len(self.streams) < 2:
            raise BenchmarkError(
                f"--streams {self.streams}: begin with 1 and give at least one more, such as 1,8"
            )
