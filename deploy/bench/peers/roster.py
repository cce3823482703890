"""Which engines take part in a comparison, with what weights, and how each is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from deploy.bench.peers.bars import Scene
from deploy.bench.peers.contender import Decode, Prefill, Setup, Workload
from deploy.bench.peers.headwise import HeadwiseContender
from deploy.bench.peers.llama_cpp import LlamaCpp, LlamaCppContender
from deploy.bench.peers.rounds import Entry
from deploy.bench.peers.settings import Settings
from deploy.bench.peers.weights import PRECISIONS, QWEN_SIZED, Weights, qwen_sized
from deploy.bench.peers.worker import WorkerContender
from deploy.bench.suite.engines import EngineOptions, running
from deploy.bench.suite.errors import BenchmarkError

_HERE = Path(__file__).parent
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Its clock goes on while it is stopped, and a step may be under way then.
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",
}


class Roster:
    """`engines` and `versions` fill up as engines are started: headwise's own, and what the peers
    say they are."""

    def __init__(self, settings: Settings, cores: int) -> None:
        self._settings = settings
        self._weights = Weights(settings.model, settings.cache)
        self.engines: dict[Setup, HeadwiseContender] = {}
        self.versions: dict[str, str] = {}
        self.scene = Scene(
            model=self._weights.name,
            ranks=settings.ranks,
            threads=settings.threads,
            cores=cores,
            single=Decode(1, 1, settings.tokens),
            many=tuple(
                Decode(count, settings.prompt_tokens, settings.tokens)
                for count in settings.streams[1:]
            ),
            prefill=Prefill(settings.prefill_tokens),
        )

    def groups(self) -> Iterator[list[Entry]]:
        """Those that are measured together."""
        scene = self.scene
        everything: tuple[Workload, ...] = (scene.single, *scene.many, scene.prefill)
        for precision in self._settings.precisions:
            group = [self._headwise(scene.ours(precision), everything)]
            one_core = scene.one_core(precision)
            if precision == "bfloat16" and one_core != scene.ours(precision):
                group.append(self._headwise(one_core, (scene.single,)))
            group.append(self._llama_cpp(scene.peer("llama.cpp", precision), everything))
            if PRECISIONS[precision].dtype is not None:
                peer = scene.peer("transformers", precision)
                group.append(self._transformers(peer, everything))
                group.append(self._vllm(scene.peer("vLLM", precision), everything))
            yield group
        if self._settings.qwen_sized and scene.ranks > 1:
            group = []
            for ranks, threads in sorted({(1, 1), (1, scene.cores), (scene.ranks, 1)}):
                ours = Setup("headwise", QWEN_SIZED, "bfloat16", ranks, threads)
                theirs = Setup("vLLM", QWEN_SIZED, "bfloat16", ranks, threads)
                group.append(self._headwise(ours, (scene.single,)))
                group.append(self._vllm(theirs, (scene.single,)))
            yield group

    def _headwise(self, setup: Setup, workloads: tuple[Workload, ...]) -> Entry:
        def start(stack: ExitStack) -> HeadwiseContender:
            precision = PRECISIONS[setup.precision]
            options = EngineOptions(
                model=str(self._model_for_headwise(setup)),
                tensor_parallel=setup.ranks,
                threads_per_rank=setup.threads,
                dtype=precision.headwise_dtype,
                quantization=precision.quantization,
                kv_memory=self._settings.kv_memory,
                max_sequences=max(self._settings.streams),
            )
            engine = stack.enter_context(running(options))
            contender = self.engines[setup] = HeadwiseContender(engine.driver)
            return contender

        return Entry(setup, workloads, start)

    def _model_for_headwise(self, setup: Setup) -> Path:
        """The very file that llama.cpp reads, where there is one."""
        if setup.model == QWEN_SIZED:
            return qwen_sized(self._settings.cache)
        if not self._weights.is_gguf or not self._settings.llama_cpp.exists():
            return self._settings.model
        return self._weights.gguf(setup.precision, LlamaCpp(self._settings.llama_cpp))

    def _llama_cpp(self, setup: Setup, workloads: tuple[Workload, ...]) -> Entry:
        def start(_: ExitStack) -> LlamaCppContender:
            programs = LlamaCpp(self._settings.llama_cpp)
            self.versions["llama.cpp"] = programs.version()
            model = self._weights.gguf(setup.precision, programs)
            return LlamaCppContender(programs, model, setup.threads)

        return Entry(setup, workloads, start)

    def _transformers(self, setup: Setup, workloads: tuple[Workload, ...]) -> Entry:
        def start(stack: ExitStack) -> WorkerContender:
            options: dict[str, str | int] = {
                "threads": setup.threads,
                **self._hugging_face(setup),
            }
            script = _HERE / "transformers_worker.py"
            return self._worker(stack, setup, Path(sys.executable), script, options, _OFFLINE)

        return Entry(setup, workloads, start)

    def _vllm(self, setup: Setup, workloads: tuple[Workload, ...]) -> Entry:
        def start(stack: ExitStack) -> WorkerContender:
            python = self._settings.vllm_python
            if not python.exists():
                raise BenchmarkError(
                    f"{python} does not exist: install vllm-cpu into an environment of its own and "
                    "give its interpreter as --vllm-python"
                )
            options: dict[str, str | int] = {
                "ranks": setup.ranks,
                "max_sequences": max(self._settings.streams),
                **self._hugging_face(setup),
            }
            # Cores of a rank are joined by commas, ranks parted by bars.
            cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
            each = [
                ",".join(cores[rank * setup.threads : (rank + 1) * setup.threads])
                for rank in range(setup.ranks)
            ]
            environment = {**_OFFLINE, **_VLLM, "VLLM_CPU_OMP_THREADS_BIND": "|".join(each)}
            script = _HERE / "vllm_worker.py"
            return self._worker(stack, setup, python, script, options, environment)

        return Entry(setup, workloads, start)

    def _hugging_face(self, setup: Setup) -> dict[str, str]:
        qwen = setup.model == QWEN_SIZED
        folder = qwen_sized(self._settings.cache) if qwen else self._weights.folder()
        return {"folder": str(folder), "dtype": PRECISIONS[setup.precision].dtype or ""}

    def _worker(
        self,
        stack: ExitStack,
        setup: Setup,
        python: Path,
        script: Path,
        options: dict[str, str | int],
        environment: dict[str, str],
    ) -> WorkerContender:
        worker = WorkerContender(setup.engine, python, script, options, environment)
        stack.enter_context(worker)
        self.versions[setup.engine] = worker.versions[setup.engine]
        return worker
