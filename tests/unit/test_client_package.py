"""The distribution: light to import, its surface complete, its stubs current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import headwise

ROOT = Path(__file__).resolve().parents[2]


def test_importing_headwise_imports_nothing_heavy() -> None:
    program = "import json, sys, headwise; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    modules = set(json.loads(run.stdout))
    assert "grpc" in modules
    heavy = {"torch", "ray", "transformers", "numpy", "cluster", "shards", "deploy"}
    assert not heavy & modules


def test_everything_public_is_there() -> None:
    for name in headwise.__all__:
        assert getattr(headwise, name) is not None


def test_the_stubs_are_what_the_protos_say() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/generate_stubs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
