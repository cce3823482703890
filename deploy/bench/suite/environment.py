"""What a number was measured on: machine, versions, commit. Numbers without it are hearsay."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from deploy.version import version

_PACKAGES = ("torch", "numba", "numpy", "ray", "transformers")
_CPU_INFO = Path("/proc/cpuinfo")
_VECTOR_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


class Environment(BaseModel):
    """`cores` are those this process may use; `load` is the machine's one-minute load average when
    the run began: well above 0, others were measured too. `commit` is None outside a checkout and
    ends in "+dirty" where files differ from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    started_at: datetime
    processor: str
    vector_extensions: tuple[str, ...]
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    commit: str | None
    load: float

    @classmethod
    def here(cls) -> Environment:
        """This machine, now."""
        flags = _cpu_field("flags").split()
        return cls(
            started_at=datetime.now(UTC),
            processor=_cpu_field("model name") or platform.processor() or platform.machine(),
            vector_extensions=tuple(flag for flag in _VECTOR_FLAGS if flag in flags),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=psutil.virtual_memory().total,
            gpus=_gpus(),
            system=platform.platform(),
            python=platform.python_version(),
            versions={"headwise": version()}
            | {name: importlib.metadata.version(name) for name in _PACKAGES},
            commit=_commit(),
            load=os.getloadavg()[0],
        )

    def sentence(self) -> str:
        """One line for people."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = "" if self.commit is None else f" at {self.commit}"
        devices = "".join(f", {gpu}" for gpu in self.gpus)
        return (
            f"{self.processor} ({' '.join(self.vector_extensions)}), {self.cores} cores"
            f"{devices}, {self.memory_bytes / 2**30:.0f} GiB; {versions}{commit}; "
            f"{self.started_at:%Y-%m-%d %H:%M} UTC, load {self.load:.2f}"
        )


def _cpu_field(name: str) -> str:
    """The first processor's field of /proc/cpuinfo; "" where there is none."""
    if not _CPU_INFO.exists():
        return ""
    for line in _CPU_INFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _gpus() -> tuple[str, ...]:
    import torch

    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_name(index) for index in range(count))


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no git here
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return f"{commit}+dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
