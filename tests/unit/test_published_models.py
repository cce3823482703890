"""The configs that well-known models are published with, which leave out and add what they like:
spec, parameter count, split and cost of each, without any weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.errors import IllegalSplit
from shards.footprint import model_size, rank_footprints
from shards.layout import make_layout
from shards.models.parameters import Cut, parameters
from shards.models.source import load_spec
from shards.models.spec import ModelSpec

# name -> {"config": as published, "parameters": as published; without what drafts or sees,
# and counting tied embeddings once}
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data/published_models.json").read_text()
)
# What a model's own page says it multiplies a token with, in billions, where it says so.
ACTIVE = {
    "Mixtral-8x7B": 12.9,
    "Qwen3-30B-A3B": 3.3,
    "Qwen3-235B-A22B": 22,
    "gpt-oss-20b": 3.6,
    "gpt-oss-120b": 5.1,
    "DeepSeek-V2-Lite": 2.4,
    "DeepSeek-V3": 37,
}


@pytest.fixture
def spec(model: str, tmp_path: Path) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model]["config"]))
    return load_spec(str(tmp_path))


@pytest.mark.parametrize("model", PUBLISHED)
def test_as_many_parameters_as_published(model: str, spec: ModelSpec) -> None:
    size = model_size(spec)
    assert size.parameters == PUBLISHED[model]["parameters"]
    if model in ACTIVE:
        # Pages count the embedding, of which a token takes a row, or do not.
        assert size.active == pytest.approx(ACTIVE[model] * 1e9, rel=0.1)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("model", PUBLISHED)
def test_ranks_hold_everything_and_little_twice(model: str, spec: ModelSpec, world: int) -> None:
    # One layer of each kind stands for all of it.
    spec = replace(spec, layers=tuple(dict.fromkeys(spec.layers)))
    heads = min(layer.attention.heads for layer in spec.layers)
    if world > heads:
        with pytest.raises(IllegalSplit, match=f"{heads} attention heads over .*={world}"):
            make_layout(spec, world)
        return
    layout = make_layout(spec, world)
    footprints = rank_footprints(spec, layout, "bfloat16")
    size = 2 * model_size(spec).parameters
    held = [footprint.weights for footprint in footprints]
    # Each rank has a copy of the norms and of what makes latents; KV heads may lie on several.
    copied = sum(
        2 * p.shape[0] * (p.shape[1] if len(p.shape) == 2 else 1)
        for p in parameters(spec)
        if p.cut in (Cut.REPLICATED, Cut.KV_HEADS)
    )
    assert size <= sum(held) <= size + (world - 1) * copied
    assert max(held) < 1.5 * (size - copied) / world + copied
    assert all(footprint.kv_per_token > 0 for footprint in footprints)


@pytest.mark.parametrize("model", ["Qwen1.5-MoE-A2.7B"])
def test_sixty_experts_on_seven_ranks(model: str, spec: ModelSpec) -> None:
    dealt = make_layout(spec, 7, expert_parallel=True).layers[0].experts
    assert sorted(len(run) for run in dealt) == [8, 8, 8, 9, 9, 9, 9]
    assert (dealt[0].start, dealt[-1].stop) == (0, 60)
    cut = make_layout(spec, 7).layers[0]
    assert all(len(run) == 60 for run in cut.experts)
    assert sum(len(run) for run in cut.expert_channels) == 1408
