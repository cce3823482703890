"""Every family equals `transformers` at every number of ranks: logits in float32, greedy tokens.

The models are tiny and random with awkward sizes: heads, KV heads, channels and vocabulary rows
that the ranks do not divide, biases that are not zero. Several prompts of different lengths run at
once, prefilled in chunks beside running decodes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import architectures
from shards.models.registry import FAMILIES as REGISTERED
from tests.models import architecture_of, save, tiny_model
from tests.parity.case import Case
from tests.ranks import generate, thread_ranks

STEPS = 64
# Both sides compute in float32, in another order: a sum of some hundred products of order 1 differs
# by about 1e-6 of the largest logit. Ten layers' worth of that is still below this.
TOLERANCE = 2e-5


def _cases() -> list[Case]:
    """Those of every cases_*.py beside this file."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    return [case for name in modules for case in import_module(f"tests.parity.{name}").CASES]


@pytest.fixture(scope="module", params=_cases(), ids=lambda case: case.name)
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
    with thread_ranks(path, world, expert_parallel=case.expert_parallel) as ranks:
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


# `Gemma3ForConditionalGeneration` is served as the text model that it holds: the same decoder.
ALIASES = {"Gemma3ForConditionalGeneration"}


def test_every_family_has_a_row() -> None:
    compared = {architecture_of(case.family) for case in _cases()}
    missing = [
        family.name
        for family in REGISTERED
        if not compared & set(family.architectures) and not ALIASES & set(family.architectures)
    ]
    assert not missing, f"add cases to tests/parity for {', '.join(missing)}"


def test_the_page_of_architectures_is_up_to_date() -> None:
    assert architectures.TARGET.read_text() == architectures.table(), (
        "run python -m scripts.architectures"
    )
