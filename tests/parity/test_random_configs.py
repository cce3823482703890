"""Random configs of every family equal `transformers`, by the reference and by the CPU kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from shards.errors import IllegalSplit
from shards.kernels.reference.kernels import ReferenceKernels
from shards.layout import make_layout
from shards.models.source import load_spec
from tests.models import FAMILIES, save, tiny_model
from tests.parity.random_configs import CONTEXT, Drawn, draw
from tests.ranks import CPU, generate, thread_ranks

STEPS = 6
# As in test_families.py, beside as much as transformers itself loses to float32: some draws let
# rounding grow from layer to layer.
TOLERANCE = 2e-5
# A draw for each family that is quick, and reaches what no row of cases_*.py has.
SEEDS = range(len(FAMILIES))


def spelled_as_before(folder: Path) -> None:
    """config.json's rotary fields as transformers 4 wrote them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    stated = config.get("rope_parameters")
    if stated is None or "full_attention" in stated:
        return
    del config["rope_parameters"]
    is_neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if is_neox else "rope_theta"] = stated.pop("rope_theta")
    if "partial_rotary_factor" in stated:
        name = "rotary_pct" if is_neox else "partial_rotary_factor"
        config[name] = stated.pop("partial_rotary_factor")
    config["rope_scaling"] = None if stated["rope_type"] == "default" else stated
    path.write_text(json.dumps(config))


def ranks_that_can(folder: Path, drawn: Drawn) -> tuple[int, bool]:
    """As many ranks as were drawn, or as the model can be dealt to."""
    spec = load_spec(str(folder))
    for expert_parallel in {drawn.expert_parallel, False}:
        for world in range(drawn.world, 0, -1):
            try:
                make_layout(spec, world, expert_parallel=expert_parallel)
            except IllegalSplit:
                continue
            return world, expert_parallel
    raise AssertionError("one rank holds any model")


def check(drawn: Drawn, folder: Path) -> None:
    model = tiny_model(drawn.family, seed=drawn.seed, **drawn.config)
    save(model, folder)
    if drawn.legacy:
        spelled_as_before(folder)
        model = type(model).from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=model.config._attn_implementation,
            experts_implementation="eager",
        )
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rng = np.random.default_rng(drawn.seed)
    prompts = [rng.integers(0, vocabulary, n).tolist() for n in (5, 8, 17, 41)]
    world, expert_parallel = ranks_that_can(folder, drawn)
    for kernels in (None, ReferenceKernels(CPU, torch.float32)):
        with thread_ranks(
            folder, world, expert_parallel=expert_parallel, context=CONTEXT, kernels=kernels
        ) as ranks:
            outputs = generate(ranks, prompts, STEPS)
        for prompt, (tokens, logits) in zip(prompts, outputs, strict=True):
            expected, exact = (
                whole(model.to(dtype), prompt + tokens)[len(prompt) - 1 : -1]
                for dtype in (torch.float32, torch.float64)
            )
            largest = np.abs(exact).max()
            rounding = np.abs(expected - exact).max() / largest
            error = np.abs(logits - expected).max() / largest
            assert error < TOLERANCE + 5 * rounding, (
                f"{drawn}: {kernels} at {world}: {error:.1e} of the largest, and transformers "
                f"rounds by {rounding:.1e}"
            )


def whole(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    check(draw(seed), tmp_path)
