"""The distribution: light to import, its surface complete, its stubs current."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("script", ["generate_stubs.py", "api_reference.py"])
def test_what_is_made_from_the_protos_is_what_they_say(script: str) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_api_reference_has_every_link_it_makes() -> None:
    text = (ROOT / "docs/api.md").read_text()
    anchors = {line.lstrip("#").strip().lower() for line in text.splitlines() if line[:1] == "#"}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= anchors


def test_the_package_is_typed() -> None:
    assert (Path(headwise.__file__).parent / "py.typed").is_file()
