"""Compiled functions are found again by the sources they were made of, all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import shards

SOURCES = Path(shards.__file__).parent


def folder_of(root: Path, cache: Path) -> str:
    script = "from shards import compile_cache; print(compile_cache.FOLDER)"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={"PYTHONPATH": str(root), "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.strip()


def test_a_change_in_what_a_kernel_calls_gets_another_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(SOURCES, tmp_path / "shards", ignore=shutil.ignore_patterns("__pycache__"))
    before = folder_of(tmp_path, cache)
    assert Path(before).parent == cache
    assert folder_of(tmp_path, cache) == before
    called = tmp_path / "shards" / "collectives" / "kernel_parts.py"
    called.write_text(called.read_text() + "\n# another version\n")
    assert folder_of(tmp_path, cache) != before
