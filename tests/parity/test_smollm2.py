"""The bundled real model: nine heads, three KV heads, quantised weights widened to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import ClusterConfig, Engine
from cluster.request import Request, SamplingParams, Stopping
from tests.ranks import ThreadLauncher

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees because",
    "List three colours: red,",
]
TOKENS = 64


@pytest.fixture(scope="module")
def reference(bundled_model: Path) -> Any:
    """transformers on the same dequantised weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        bundled_model.parent, gguf_file=bundled_model.name, dtype=torch.float32
    )


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda world: f"tp{world}")
def engine(request: pytest.FixtureRequest, bundled_model: Path) -> Any:
    config = ClusterConfig(
        model=str(bundled_model),
        tensor_parallel=request.param,
        threads_per_rank=1,
        kv_memory=256 << 20,  # type: ignore[arg-type]
        max_context=1024,
    )
    with Engine(config, launcher=ThreadLauncher(request.param)) as engine:
        yield engine


@pytest.mark.model
def test_greedy_tokens_equal_transformers(engine: Engine, reference: Any) -> None:
    generations = engine.generate(
        PROMPTS, max_tokens=TOKENS, temperature=0, ignore_eos=True, progress=False
    )
    codec = engine.driver.codec
    assert codec is not None
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = codec.encode(prompt)
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + list(generation.token_ids)])).logits[0]
        expected = logits[len(ids) - 1 : -1].argmax(-1).tolist()
        assert list(generation.token_ids) == expected
        assert generation.text == codec.decode(expected)


@pytest.mark.model
def test_a_seed_gives_the_same_text_in_any_company(engine: Engine) -> None:
    def sample(prompts: list[str]) -> list[str]:
        generations = engine.generate(
            prompts, max_tokens=24, temperature=0.9, top_p=0.95, seed=7, progress=False
        )
        return [generation.text for generation in generations]

    together = sample(PROMPTS)
    assert [sample([prompt])[0] for prompt in PROMPTS] == together


@pytest.mark.model
def test_a_long_prompt_is_computed_in_chunks(engine: Engine, reference: Any) -> None:
    codec = engine.driver.codec
    assert codec is not None
    ids = codec.encode(" ".join(str(i) for i in range(190)))[:700]
    request = Request("long", tuple(ids), SamplingParams(temperature=0.0), Stopping(max_tokens=4))
    tokens = [t for event in engine.driver.submit(request) for t in event.tokens]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids + tokens])).logits[0]
    assert tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()
