"""FP8 folders: what a rank reads are the dequantised weights, wherever its slice begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from shards.checkpoint.loader import load_shard
from shards.errors import CheckpointError, UnsupportedModel
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.source import load_spec, open_model
from shards.quantization.tensor import QuantizedTensor
from tests.models import save, tiny_model
from tests.ranks import CPU, generate, thread_ranks

LARGEST = 448.0  # of E4M3

Grid = Callable[[int, int], tuple[int, int]]
"""The rows and inputs of a weight -> the rows and inputs that share a scale."""


def encoded(weight: torch.Tensor, rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 elements, and the scales of blocks of so many `rows` and `inputs`."""
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // inputs))
    for i, down in enumerate(weight.split(rows, 0)):
        for j, block in enumerate(down.split(inputs, 1)):
            scales[i, j] = (block.abs().max() / LARGEST).log2().ceil().exp2() * (1 + 0.25 * (j % 2))
    return (weight / spread(scales, weight, rows, inputs)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, weight: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    """A scale for every element of `weight`."""
    factors = scales.repeat_interleave(rows, 0).repeat_interleave(inputs, 1)
    return factors[: weight.shape[0], : weight.shape[1]]


def quantise(
    folder: Path,
    config: Mapping[str, Any],
    grid: Grid,
    *,
    suffix: str = "weight_scale",
    stored: Callable[[torch.Tensor], torch.Tensor] = lambda scales: scales,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Every projection in `folder` to FP8, and what it then stands for, by name."""
    path = folder / "model.safetensors"
    kept, meant = {}, {}
    for name, weight in load_file(path).items():
        if not name.endswith("_proj.weight"):
            kept[name] = meant[name] = weight
            continue
        block = grid(*weight.shape)
        kept[name], scales = encoded(weight, *block)
        written = kept[f"{name.removesuffix('weight')}{suffix}"] = stored(scales).contiguous()
        read = written.float().reshape(scales.shape)
        meant[name] = kept[name].float() * spread(read, weight, *block)
    save_file({**kept, **(extra or {})}, path, metadata={"format": "pt"})
    edit = json.loads((folder / "config.json").read_text())
    edit["quantization_config"] = dict(config)
    (folder / "config.json").write_text(json.dumps(edit))
    return meant


def assembled(folder: Path, world: int) -> dict[str, torch.Tensor]:
    """All ranks' slices put together, by the checkpoint's own names."""
    source = open_model(str(folder))
    layout = make_layout(source.spec, world)
    table = parameters(source.spec)
    whole = {p.name: torch.full(p.shape, torch.nan) for p in table}
    for rank in range(world):
        shard = load_shard(source, layout, rank, torch.float32, CPU)
        for p in table:
            owned = layout.owned(p, rank)
            held = shard[p.name]
            assert isinstance(held, torch.Tensor)
            whole[p.name].narrow(p.axis, owned.start, len(owned)).copy_(held)
    return {source.sources[name].tensor: tensor for name, tensor in whole.items()}


def blockwise(rows: int, inputs: int) -> tuple[int, int]:
    return 16, 16


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
# 9 heads of 8 channels, 101 channels: ranks' slices begin and end within blocks of 16.
SIZES = {"num_attention_heads": 9, "num_key_value_heads": 3}


def compressed(strategy: str, block: list[int] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }


CASES = {
    "blocks": (BLOCKS, blockwise, {"suffix": "weight_scale_inv"}),
    "blocks-of-compressed-tensors": (compressed("block", [16, 16]), blockwise, {}),
    "blocks-with-powers-of-two": (
        BLOCKS | {"scale_fmt": "ue8m0"},
        blockwise,
        {"suffix": "weight_scale_inv", "stored": lambda scales: scales.to(torch.float8_e8m0fnu)},
    ),
    "rows": (compressed("channel"), lambda rows, inputs: (1, inputs), {}),
    "tensors": (
        compressed("tensor"),
        lambda rows, inputs: (rows, inputs),
        {"stored": lambda scales: scales.flatten()},
    ),
    "scalars-and-scales-of-activations": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda rows, inputs: (rows, inputs),
        {
            "stored": lambda scales: scales[0, 0],
            "extra": {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())}
            | {"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)},
        },
    ),
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_read_what_the_weights_stand_for(case: str, world: int, tmp_path: Path) -> None:
    config, grid, options = CASES[case]
    meant = quantise(save(tiny_model("qwen3", **SIZES), tmp_path), config, grid, **options)
    found = assembled(tmp_path, world)
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor), name


# transformers' scales divide the weights evenly.
EVEN = {"num_attention_heads": 8, "hidden_size": 64, "vocab_size": 64, "intermediate_size": 96}
EVEN_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 48},
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "moe_intermediate_size": 48,
        "q_lora_rank": 32,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
}


@pytest.mark.parametrize("family", EVEN_FAMILIES)
def test_logits_are_those_of_the_weights_that_transformers_widens(
    family: str, tmp_path: Path
) -> None:
    save(tiny_model(family, **{**EVEN, **EVEN_FAMILIES[family]}), tmp_path)
    quantise(tmp_path, BLOCKS, blockwise, suffix="weight_scale_inv")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True),
        dtype=torch.float32,
        experts_implementation="eager",
    )
    prompt = [3, 1, 4, 1, 5]
    with thread_ranks(tmp_path, 3) as ranks:
        [(tokens, logits)] = generate(ranks, [prompt], 8)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].numpy()
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


def test_weights_without_scales_or_with_others_are_refused(tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3", **SIZES), tmp_path)
    quantise(folder, BLOCKS, blockwise, suffix="weight_scale_inv")
    path = folder / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.up_proj.weight_scale_inv"
    scales = whole.pop(name)
    save_file(whole, path)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is F8_E4M3 and has n"
    ):
        open_model(str(folder))
    save_file(whole | {name: scales[:, 1:].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"its scales are \[7, 4\]: expected .*\[7, 5\]"):
        open_model(str(folder))
    save_file(whole | {name: scales.int()}, path)
    with pytest.raises(UnsupportedModel, match=r"scales of tensor .* are I32"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fp8' with fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"blocks of \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        (compressed("channel") | {"format": "pack-quantized"}, "format 'pack-quantized'"),
        (compressed("group"), "strategy 'group'"),
        ({"bits": 4}, "quant_method None"),
        ("fp8", "'fp8': an object is needed"),
    ],
)
def test_what_cannot_be_read_is_named(stated: Any, told: str, tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3"), tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stated}))
    for read in (load_spec, open_model):
        with pytest.raises(UnsupportedModel, match=f"quantization_config .*{told}"):
            read(str(folder))


def test_fp8_is_quantised_anew_on_request(tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3", **EVEN, **EVEN_FAMILIES["qwen3"]), tmp_path)
    meant = quantise(folder, BLOCKS, blockwise, suffix="weight_scale_inv")
    source = open_model(str(folder))
    shard = load_shard(
        source, make_layout(source.spec, 1), 0, torch.float32, CPU, quantization="int8"
    )
    up = shard["layers.0.ffn.up.weight"]
    assert isinstance(up, QuantizedTensor)
    whole = meant["model.layers.0.mlp.up_proj.weight"]
    assert (up.dequantize() - whole).abs().max() < whole.abs().max() / 200
