"""What `headwise serve` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig, ServerConfig
from cluster.errors import StartupError
from deploy import preflight
from deploy.plan_report import make_plan
from shards.cost.precision import Precision
from shards.errors import CheckpointError, NotEnoughMemory
from shards.footprint import settle_dtype
from shards.layout import make_layout
from shards.models.source import load_spec
from tests.models import save, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, 9 heads over 3 KV heads."""
    return save(tiny_model("llama").bfloat16(), tmp_path_factory.mktemp("tiny"))


def check(model: Path, **options: Any) -> None:
    cluster = {"model": str(model), "tensor_parallel": 2, **options}
    preflight.check(ClusterConfig.model_validate(cluster), ServerConfig(grpc_port=0, http_port=0))


def test_a_cache_smaller_than_a_block(model: Path) -> None:
    config = ClusterConfig(model=str(model), tensor_parallel=2)
    block = max(draw_up(config).block_bytes)
    check(model, kv_memory=block)
    with pytest.raises(NotEnoughMemory, match=f"kv_memory={block - 1}.* takes {block:,} bytes"):
        check(model, kv_memory=block - 1)


def test_a_tokenizer_that_is_not_there(model: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match=r"nowhere'? not found: no such path"):
        check(model, tokenizer=str(nowhere))


def test_a_folder_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        check(model, tokenizer=str(tmp_path))


def test_traces_for_which_there_is_no_exporter(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nowhere")
    with pytest.raises(StartupError, match="no exporter 'nowhere'"):
        preflight.check(
            ClusterConfig(model=str(model)), ServerConfig(grpc_port=0, http_port=0, trace=True)
        )


@pytest.mark.parametrize(("there", "words"), [(0, "has 0: use device=cpu"), (1, "_parallel <= 1")])
def test_more_ranks_than_gpus(
    model: Path, there: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_gpus_here", lambda: there)
    with pytest.raises(StartupError, match=words):
        check(model, device="cuda")


def test_as_many_gpus_as_ranks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_gpus_here", lambda: 2)
    check(model, device="cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_is_of_what_will_be_served(model: Path, device: str) -> None:
    config = ClusterConfig.model_validate(
        {"model": str(model), "tensor_parallel": 2, "device": device}
    )
    blueprint = draw_up(config)
    spec = load_spec(str(model))
    assert spec.dtype == "bfloat16"
    planned = make_plan(
        spec,
        make_layout(spec, 2),
        model="m",
        precision=Precision(settle_dtype("auto", spec)),
        context=blueprint.context,
    )

    assert planned.dtype == blueprint.dtype
    footprints = [(rank.weight_bytes, rank.kv_bytes_per_token) for rank in planned.ranks]
    assert footprints == [(f.weights, f.kv_per_token) for f in blueprint.footprints]
