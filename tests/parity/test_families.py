"""Every family equals `transformers` at every number of ranks: logits in float32, greedy tokens.

The models are tiny and random with awkward sizes: heads, KV heads, channels and vocabulary rows
that the ranks do not divide, biases that are not zero. Several prompts of different lengths run at
once, prefilled in chunks beside running decodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.models import save, tiny_model
from tests.ranks import generate, thread_ranks

STEPS = 64
# Both sides compute in float32, in another order: a sum of some hundred products of order 1 differs
# by about 1e-6 of the largest logit. Ten layers' worth of that is still below this.
TOLERANCE = 2e-5


class Case(NamedTuple):
    name: str
    family: str
    config: dict[str, Any]
    worlds: tuple[int, ...] = (1, 2, 3, 4, 5)


CASES = [
    Case("llama-9-3", "llama", {"num_attention_heads": 9, "num_key_value_heads": 3}),
    Case(
        "llama-7-1-untied-biased",
        "llama",
        {
            "hidden_size": 56,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    Case(
        "llama-rope-llama3",
        "llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "llama-rope-linear",
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        },
        (1, 2, 3, 4),
    ),
    Case(
        "llama-rope-yarn",
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        (1, 3),
    ),
    Case(
        "qwen2-14-2",
        "qwen2",
        {"hidden_size": 84, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    Case(
        "qwen2-9-3-untied",
        "qwen2",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ),
    Case("mistral-window", "mistral", {}),
    Case(
        "qwen2-some-windows",
        "qwen2",
        {
            "hidden_size": 84,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
        },
    ),
    Case("gpt2-7", "gpt2", {"n_head": 7, "n_embd": 56}),
    Case(
        "gpt2-scaled-by-layer",
        "gpt2",
        {"n_head": 4, "n_embd": 32, "n_inner": 70, "scale_attn_by_inverse_layer_idx": True},
        (1, 2, 3, 4),
    ),
    Case("bigcode-mqa-7", "gpt_bigcode", {"n_head": 7, "n_embd": 56, "multi_query": True}),
    Case(
        "bigcode-mha-5",
        "gpt_bigcode",
        {"n_head": 5, "n_embd": 40, "multi_query": False},
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    case: Case = request.param
    model = tiny_model(case.family, **case.config)
    path: Path = tmp_path_factory.mktemp(case.name)
    save(model, path)
    return case, model, path


def prompts(vocabulary: int) -> list[list[int]]:
    """Lengths around block (8) and chunk (16) borders, one token at the least."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocabulary, n).tolist() for n in (1, 8, 17, 41)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_equals_transformers(reference: Any, world: int) -> None:
    case, model, path = reference
    if world not in case.worlds:
        pytest.skip(f"{case.name} has no split over {world} ranks")
    with thread_ranks(path, world) as ranks:
        outputs = generate(ranks, prompts(ranks.vocabulary), STEPS)
        given = prompts(ranks.vocabulary)
    for prompt, (tokens, logits) in zip(given, outputs, strict=True):
        with torch.inference_mode():
            whole = model(torch.tensor([prompt + tokens])).logits[0].numpy()
        expected = whole[len(prompt) - 1 : -1]
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, f"logits differ by {error:.1e} of the largest"
        assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("capacity", [(2.0, 1.0, 1.0), (1.0, 5.0)])
def test_capacity_changes_the_split_and_not_the_answer(
    tmp_path: Path, capacity: tuple[float, ...]
) -> None:
    model = tiny_model("llama", num_attention_heads=9, num_key_value_heads=3)
    save(model, tmp_path)
    prompt = [3, 1, 4, 1, 5]
    with thread_ranks(tmp_path, len(capacity), capacity=capacity) as ranks:
        [(tokens, _)] = generate(ranks, [prompt], 24)
    with thread_ranks(tmp_path, 1) as ranks:
        [(alone, _)] = generate(ranks, [prompt], 24)
    assert tokens == alone
