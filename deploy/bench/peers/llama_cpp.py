"""llama.cpp, by its own benchmarks: llama-bench for one stream, llama-batched-bench for several."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from deploy.bench.peers.contender import Decode, Prefill, Workload
from deploy.bench.suite.errors import BenchmarkError

PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")


class LlamaCpp:
    """The programs in `folder`; raises `BenchmarkError` where one is missing."""

    def __init__(self, folder: Path) -> None:
        for program in PROGRAMS:
            if not (folder / program).is_file():
                raise BenchmarkError(
                    f"{folder} has no {program}: build it with "
                    f"`headwise bench peers --build-llama-cpp {folder}`"
                )
        self._folder = folder

    def version(self) -> str:
        """What the build says of itself."""
        note = self._folder / "VERSION"
        return note.read_text().strip() if note.is_file() else "unknown"

    def quantize(self, source: Path, target: Path, kind: str) -> None:
        """Write `source` as `kind` (F32, BF16, F16, Q8_0, Q4_0) to `target`."""
        self._run("llama-quantize", "--allow-requantize", str(source), str(target), kind)

    def bench(self, model: Path, *options: str) -> list[dict[str, Any]]:
        """One repetition of llama-bench, after its warm-up."""
        out = self._run("llama-bench", "-m", str(model), "-r", "1", "-o", "json", *options)
        found: list[dict[str, Any]] = json.loads(out)
        return found

    def batched_bench(self, model: Path, *options: str) -> list[dict[str, Any]]:
        """One run of llama-batched-bench."""
        out = self._run(
            "llama-batched-bench", "-m", str(model), "--output-format", "jsonl", *options
        )
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._folder / program), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            last = ran.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise BenchmarkError(f"{' '.join(command)} ended with {ran.returncode}: {last[0]}")
        return ran.stdout


class LlamaCppContender:
    """One GGUF file on `threads` threads; every measurement is a process of its own, whose start
    and loading llama.cpp leaves out. llama.cpp draws its own tokens."""

    def __init__(self, programs: LlamaCpp, model: Path, threads: int) -> None:
        self._programs, self._model, self._threads = programs, model, str(threads)

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        match workload:
            case Prefill(tokens):
                return self._bench("-p", str(tokens), "-n", "0")
            case Decode(streams=1, prompt_tokens=prompt, tokens=tokens):
                depth = ("-d", str(prompt)) if prompt > 1 else ()
                return self._bench("-p", "0", "-n", str(tokens), *depth)
            case Decode(streams, prompt, tokens):
                [found] = self._programs.batched_bench(
                    self._model,
                    *("-t", self._threads, "-c", str(streams * (prompt + tokens))),
                    *("-npp", str(prompt), "-ntg", str(tokens), "-npl", str(streams)),
                )
                return float(found["speed_tg"])

    def _bench(self, *options: str) -> float:
        [found] = self._programs.bench(self._model, "-t", self._threads, *options)
        return float(found["samples_ts"][0])
