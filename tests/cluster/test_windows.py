"""Layers that see a window only: blocks behind it go back to the pool while a sequence runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.request import Request, SamplingParams, Stopping
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

WINDOW, BLOCK, PROMPTS = 13, 8, (1, 30, 60)
TOKENS = 120


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny_model("mistral", sliding_window=WINDOW)
    return model, save(model, tmp_path_factory.mktemp("mistral"))


@pytest.fixture(params=[1, 2], ids=lambda world: f"tp{world}")
def driver(request: pytest.FixtureRequest, mistral: tuple[Any, Path]) -> Iterator[Driver]:
    """Room for the longest prompt and little more: without giving back, nearly all would wait."""
    config: dict[str, Any] = {
        "model": str(mistral[1]),
        "tensor_parallel": request.param,
        "block_size": BLOCK,
        "max_step_tokens": 16,
        "threads_per_rank": 1,
    }
    whole_request = -(-(max(PROMPTS) + TOKENS) // BLOCK)
    block_bytes = max(draw_up(ClusterConfig.model_validate(config)).block_bytes)
    config["kv_memory"] = (whole_request + 4) * block_bytes
    driver = Driver(draw_up(ClusterConfig.model_validate(config)))
    driver.start(ThreadLauncher(request.param))
    yield driver
    driver.stop()


def test_long_sequences_share_a_small_pool_and_equal_transformers(
    driver: Driver, mistral: tuple[Any, Path]
) -> None:
    prompts = [[(5 * i + n) % 131 for i in range(n)] for n in PROMPTS]
    streams = [
        driver.submit(
            Request(str(i), tuple(p), SamplingParams(temperature=0), Stopping(max_tokens=TOKENS))
        )
        for i, p in enumerate(prompts)
    ]
    answers = [[token for event in stream for token in event.tokens] for stream in streams]
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = mistral[0](torch.tensor([prompt + tokens])).logits[0]
        assert tokens == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    # All ran side by side; what they hold in the end is a window each, not their whole length.
    load = driver.load()
    assert load.preemptions == 0
    assert load.kv_blocks_used == 0
    assert load.kv_blocks < sum(-(-(len(p) + TOKENS) // BLOCK) for p in prompts)
