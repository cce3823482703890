"""What `headwise plan` says a model takes is what loading it takes, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.plan_report import PlanReport, make_plan
from shards.checkpoint.loader import load_shard
from shards.checkpoint.storage import load_stored
from shards.cost.precision import Precision, Quantization
from shards.footprint import CacheKind
from shards.kernels.reference.kernels import ReferenceKernels
from shards.layout import make_layout
from shards.models.source import open_model
from shards.models.spec import LatentAttention
from tests.gguf_experts import write_gguf as write_experts
from tests.models import save, tiny_model, write_gguf

CPU = torch.device("cpu")
BLOCKS_OF_32 = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
}


def planned(path: Path, world: int, quantization: Quantization = "auto") -> PlanReport:
    spec, stored = load_stored(str(path))
    return make_plan(
        spec,
        make_layout(spec, world),
        model="m",
        precision=Precision("float32", quantization, stored),
        context=spec.context,
    )


def loaded_bytes(path: Path, world: int, quantization: Any) -> list[int]:
    source = open_model(str(path))
    layout = make_layout(source.spec, world)
    return [
        sum(
            weight.nbytes
            for weight in load_shard(
                source, layout, rank, torch.float32, CPU, quantization=quantization
            ).values()
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("quantization", ["auto", "none", "int8", "int4"])
@pytest.mark.parametrize("stored", ["Q4_0", "Q8_0", "Q5_1", "F16"])
def test_weights_of_a_gguf_file(
    stored: str, quantization: Quantization, world: int, tmp_path: Path
) -> None:
    model = tiny_model("llama", **BLOCKS_OF_32)
    path = write_gguf(model, tmp_path / "model.gguf", stored)
    found = planned(path, world, quantization)
    assert [rank.weight_bytes for rank in found.ranks] == loaded_bytes(path, world, quantization)
    if world == 1:
        size = found.bits_per_weight * found.parameters / 8
        assert size == pytest.approx(found.ranks[0].weight_bytes)


def test_blocks_cost_what_they_are_and_not_what_they_are_widened_to(tmp_path: Path) -> None:
    model = tiny_model("llama", **BLOCKS_OF_32)
    bits = {
        stored: planned(write_gguf(model, tmp_path / f"{stored}.gguf", stored), 1).bits_per_weight
        for stored in ("Q4_0", "Q4_1", "Q8_0", "F32")
    }
    # Norms are floats: 5 of them, 64 wide.
    norms = 5 * 64 / sum(parameter.numel() for parameter in model.parameters())
    assert bits == {
        stored: pytest.approx(each * (1 - norms) + 32 * norms)
        for stored, each in (("Q4_0", 4.5), ("Q4_1", 5.0), ("Q8_0", 8.5), ("F32", 32.0))
    }


def test_experts_of_a_quantised_file(tmp_path: Path) -> None:
    model = tiny_model("mixtral", **{**BLOCKS_OF_32, "head_dim": 16})
    path = write_experts(model, tmp_path / "model.gguf", experts="Q4_0")
    found = planned(path, 3)
    assert [rank.weight_bytes for rank in found.ranks] == loaded_bytes(path, 3, "auto")
    assert found.bits_per_weight < 32


KINDS: dict[str, tuple[str, dict[str, Any], list[tuple[str, int | None, int]]]] = {
    "mha": ("gpt2", {}, [("MHA", None, 2 * 7 * 8)]),
    "gqa": ("llama", {}, [("GQA", None, 2 * 3 * 8)]),
    "mqa": ("llama", {"num_key_value_heads": 1}, [("MQA", None, 2 * 8)]),
    "windows": (
        "gemma2",
        {"num_hidden_layers": 3},
        [("GQA", 13, 2 * 3 * 12), ("GQA", None, 2 * 3 * 12)],
    ),
    "mla": ("deepseek_v3", {}, [("MLA", None, 28 + 6)]),
    "experts": ("mixtral", {}, [("GQA", None, 2 * 3 * 8)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kv_cache_side_by_side(kind: str, tmp_path: Path) -> None:
    """float32 is 4 bytes; what each rank is said to cache of a token is what it allocates."""
    family, fields, expected = KINDS[kind]
    folder = save(tiny_model(family, **fields), tmp_path)
    found = planned(folder, 2)
    assert [(k.kind, k.window, k.bytes_per_token) for k in found.cache_kinds] == [
        (name, window, 4 * channels) for name, window, channels in expected
    ]
    assert sum(k.layers for k in found.cache_kinds) == len(open_model(str(folder)).spec.layers)
    assert all(
        isinstance(k, CacheKind) and k.bytes_per_token <= k.as_mha for k in found.cache_kinds
    )
    assert [rank.kv_bytes_per_token for rank in found.ranks] == [
        allocated(folder, 2, rank) for rank in range(2)
    ]


def allocated(folder: Path, world: int, rank: int) -> int:
    """Bytes of one token in the caches of a rank."""
    spec = open_model(str(folder)).spec
    layout = make_layout(spec, world)
    kernels, total = ReferenceKernels(CPU, torch.float32), 0
    for layer, split in zip(spec.layers, layout.layers, strict=True):
        a, kv_heads = layer.attention, len(split.kv_heads[rank])
        latent = isinstance(a, LatentAttention)
        value_dim = a.latent if isinstance(a, LatentAttention) else None
        cache = kernels.allocate(4, kv_heads, 16, a.head_dim, value_dim)
        total += cache.keys.nbytes + (0 if latent else cache.values.nbytes)
    return total // (4 * 16)
