"""What a router may do to its experts, compared with `transformers`, experts cut and dealt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.models import save, tiny_model
from tests.ranks import generate, thread_ranks

STEPS = 16
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]


def _all_but_one(mlp: Any) -> None:
    mlp.router.bias[1] = -100.0


def _all_to_one(mlp: Any) -> None:
    mlp.router.bias[3] = 100.0


def _all_to_one_by_correction(mlp: Any) -> None:
    mlp.gate.e_score_correction_bias[6] = 10.0


def _ties(mlp: Any) -> None:
    mlp.gate.weight.zero_()


def _ties_between_groups(mlp: Any) -> None:
    mlp.gate.weight.zero_()
    mlp.gate.e_score_correction_bias.zero_()


ROUTERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None]]] = {
    "an expert without tokens": ("gpt_oss", {}, _all_but_one),
    "all tokens on one expert": ("gpt_oss", {"num_experts_per_tok": 1}, _all_to_one),
    "all tokens on one expert by correction": (
        "deepseek_v3",
        {"num_experts_per_tok": 1},
        _all_to_one_by_correction,
    ),
    "every expert": ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 3}, lambda mlp: None),
    "one expert": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}, lambda mlp: None),
    "ties": ("mixtral", {}, _ties),
    "ties between groups": ("deepseek_v3", {}, _ties_between_groups),
}


@pytest.fixture(scope="module", params=ROUTERS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, fields, route = ROUTERS[request.param]
    made = tiny_model(family, **fields)
    with torch.no_grad():
        for layer in made.model.layers:
            if hasattr(layer.mlp, "experts"):
                route(layer.mlp)
    return made


@pytest.mark.parametrize(("world", "expert_parallel"), [(1, False), (2, False), (2, True)])
def test_equals_transformers(
    model: PreTrainedModel, world: int, expert_parallel: bool, tmp_path: Path
) -> None:
    if expert_parallel and getattr(model.config, "num_local_experts", 2) < world:
        pytest.skip("fewer experts than ranks")
    save(model, tmp_path)
    with thread_ranks(tmp_path, world, expert_parallel=expert_parallel) as ranks:
        outputs = generate(ranks, PROMPTS, STEPS)
    for prompt, (tokens, logits) in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            whole = model(torch.tensor([prompt + tokens])).logits[0].numpy()
        expected = whole[len(prompt) - 1 : -1]
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 2e-5
        assert tokens == expected.argmax(-1).tolist()
