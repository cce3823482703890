"""A peer that is a Python library, in a process (and, if need be, a virtual environment) of its
own. It is asked on its stdin and answers on its stdout, a JSON object per line; see
`transformers_worker.py` and `vllm_worker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil

from deploy.bench.peers.contender import Prefill, Workload
from deploy.bench.suite.errors import BenchmarkError

_STOP_SECONDS = 30.0
_SHARED_MEMORY = Path("/dev/shm")


class WorkerContender:
    """The script `script` run by `python`; stopped (SIGSTOP) whenever it is not asked, since some
    engines poll while idle. Raises `BenchmarkError` where it does not start."""

    def __init__(
        self,
        name: str,
        python: Path,
        script: Path,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self._name = name
        # Another environment's modules are none of its own.
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # Takes its sockets and its log; removed at the end, unless the log explains something.
        self._scratch = Path(tempfile.mkdtemp(prefix=f"headwise-{name}-"))
        self._log = (self._scratch / "log").open("w+")
        self._failed = False
        self._process = subprocess.Popen(
            [str(python), str(script), json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**inherited, "TMPDIR": str(self._scratch), **environment},
            start_new_session=True,  # with its children, one group to stop and to end
        )
        try:
            self.versions: dict[str, str] = self._answer()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        kind = "prefill" if isinstance(workload, Prefill) else "decode"
        question = json.dumps({"kind": kind, "seed": seed, **asdict(workload)})
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            return float(self._answer()["tokens_per_s"])
        except BrokenPipeError as error:
            raise self._died() from error
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it and all that it started, and remove the shared memory that they forget."""
        assert self._process.stdin is not None
        shared = self._shared_memory()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for path in shared:
            path.unlink(missing_ok=True)
        self._log.close()
        if not self._failed:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> BenchmarkError:
        self._failed = True
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in said if "Error" in line]
        [cause] = (errors or said or ["it said nothing"])[-1:]
        return BenchmarkError(f"{self._name} ended: {cause} (all of it: {self._log.name})")

    def _shared_memory(self) -> set[Path]:
        """The files in /dev/shm that its processes have mapped."""
        found: set[Path] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self._process.pid)
            for process in (leader, *leader.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.update(Path(mapped.path) for mapped in process.memory_maps())
        return {path for path in found if path.parent == _SHARED_MEMORY}

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
