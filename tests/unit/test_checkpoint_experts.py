"""Experts and latent attention, read from a Hugging Face folder and from GGUF: every rank's slices
put together are the weights of the model, experts cut or dealt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shards.checkpoint.loader import load_shard
from shards.errors import CheckpointError
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.source import ModelSource, load_spec, open_model
from tests.gguf_experts import write_gguf
from tests.models import save, tiny_model

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_oss": {},
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {},
}


def expected(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """headwise's parameters, taken from the live model as its own forward pass takes them."""
    body = model.model
    weights = {
        "embedding.weight": body.embed_tokens.weight,
        "norm.weight": body.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for i, layer in enumerate(body.layers):
        at = f"layers.{i}"
        weights[f"{at}.attention_norm.weight"] = layer.input_layernorm.weight
        weights[f"{at}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
        attention = layer.self_attn
        parts = (
            _latent(model.config, attention)
            if hasattr(attention, "kv_b_proj")
            else _attention(attention)
        )
        weights |= {f"{at}.attention.{name}": tensor for name, tensor in parts.items()}
        weights |= {f"{at}.{name}": tensor for name, tensor in _ffn(layer.mlp).items()}
    return {name: tensor.detach() for name, tensor in weights.items()}


def _named(modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{suffix}": tensor
        for name, module in modules.items()
        for suffix, tensor in module.named_parameters()
    }


def _attention(attention: Any) -> dict[str, torch.Tensor]:
    named = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    named |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    modules = {name: getattr(attention, theirs, None) for name, theirs in named.items()}
    weights = _named({name: module for name, module in modules.items() if module is not None})
    if hasattr(attention, "sinks"):
        weights["sinks.weight"] = attention.sinks
    return weights


def _latent(config: Any, attention: Any) -> dict[str, torch.Tensor]:
    modules = {
        "kv_down": attention.kv_a_proj_with_mqa,
        "kv_norm": attention.kv_a_layernorm,
        "out": attention.o_proj,
    }
    if config.q_lora_rank is None:
        modules["q"] = attention.q_proj
    else:
        modules |= {"q_down": attention.q_a_proj, "q_norm": attention.q_a_layernorm}
        modules["q"] = attention.q_b_proj
    by_head = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
    k, v = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return _named(modules) | {"k_up.weight": k.flatten(0, 1), "v_up.weight": v.flatten(0, 1)}


def _ffn(mlp: Any) -> dict[str, torch.Tensor]:
    def gated(at: str, module: Any) -> dict[str, Any]:
        return {f"{at}.{part}": getattr(module, f"{part}_proj") for part in ("gate", "up", "down")}

    if not hasattr(mlp, "experts"):
        return _named(gated("ffn", mlp))
    weights = _named({"router": mlp.router if hasattr(mlp, "router") else mlp.gate})
    if hasattr(mlp, "gate") and hasattr(mlp.gate, "e_score_correction_bias"):
        weights["router.correction"] = mlp.gate.e_score_correction_bias
    for shared in ("shared_expert", "shared_experts"):
        if hasattr(mlp, shared):
            weights |= _named(gated("shared", getattr(mlp, shared)))
    if hasattr(mlp, "shared_expert_gate"):
        weights |= _named({"shared_gate": mlp.shared_expert_gate})
    return weights | _experts(mlp.experts)


def _experts(experts: Any) -> dict[str, torch.Tensor]:
    weights = {}
    for e, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS
            bias = experts.gate_up_proj_bias[e]
            gate, up, down = gate_up.T[::2], gate_up.T[1::2], down.T
            weights[f"experts.{e}.gate.bias"] = bias[::2]
            weights[f"experts.{e}.up.bias"] = bias[1::2]
            weights[f"experts.{e}.down.bias"] = experts.down_proj_bias[e]
        else:
            gate, up = gate_up.chunk(2)
        weights |= {
            f"experts.{e}.{part}.weight": tensor
            for part, tensor in (("gate", gate), ("up", up), ("down", down))
        }
    return weights


def assembled(source: ModelSource, world: int, *, expert_parallel: bool) -> dict[str, torch.Tensor]:
    """All ranks' slices put where the layout says they belong; NaN where nobody had anything."""
    layout = make_layout(source.spec, world, expert_parallel=expert_parallel)
    whole = {p.name: torch.full(p.shape, torch.nan) for p in parameters(source.spec)}
    for rank in range(world):
        shard = load_shard(source, layout, rank, torch.float32, CPU)
        for p in parameters(source.spec):
            owned = layout.owned(p, rank)
            if len(owned):
                held = shard[p.name]
                assert isinstance(held, torch.Tensor)
                whole[p.name].narrow(p.axis, owned.start, len(owned)).copy_(held)
    return whole


def check(source: ModelSource, model: PreTrainedModel, *, expert_parallel: bool) -> None:
    weights = expected(model)
    whole = assembled(source, 3, expert_parallel=expert_parallel)
    assert whole.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["cut", "dealt"])
@pytest.mark.parametrize("family", MODELS)
def test_a_folder_gives_the_weights(family: str, expert_parallel: bool, tmp_path: Path) -> None:
    model = tiny_model(family, **MODELS[family])
    check(open_model(str(save(model, tmp_path))), model, expert_parallel=expert_parallel)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["cut", "dealt"])
@pytest.mark.parametrize("family", MODELS)
def test_a_gguf_file_gives_the_weights(family: str, expert_parallel: bool, tmp_path: Path) -> None:
    model = tiny_model(family, **MODELS[family])
    path = write_gguf(model, tmp_path / "model.gguf")
    check(open_model(str(path)), model, expert_parallel=expert_parallel)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, fields) for family, fields in MODELS.items() if family != "gpt_oss"),
        # What a file does not state: the limit of the clamp, that YaRN's borders are not rounded.
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_limit": 7.0, "rope_parameters": YARN | {"truncate": False}}),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
        (
            "deepseek_v2",
            {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "n_group": 4}
            | {"topk_group": 2, "routed_scaling_factor": 16.0}
            | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        ),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ],
)
def test_gguf_and_folder_give_one_spec(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    # Powers of two survive the float32 of GGUF's metadata.
    model = tiny_model(family, rms_norm_eps=2.0**-20, **fields)
    folder = load_spec(str(save(model, tmp_path / "folder")))
    assert load_spec(str(write_gguf(model, tmp_path / "model.gguf"))) == folder


MXFP4_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} | {
    "num_key_value_heads": 2
}


def _save_as_published(folder: Path) -> PreTrainedModel:
    """A GPT-OSS whose experts are MXFP4 blocks in `folder`, and the model they are the weights of,
    widened by transformers."""
    model = tiny_model("gpt_oss", **MXFP4_SIZES)
    generator = torch.Generator().manual_seed(3)
    blocks = {}
    for i, layer in enumerate(model.model.layers):
        for part in ("gate_up_proj", "down_proj"):
            weights = getattr(layer.mlp.experts, part)
            experts, inputs, outputs = weights.shape
            shape = (experts, outputs, inputs // 32)
            codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 127, shape, dtype=torch.uint8, generator=generator)
            at = f"model.layers.{i}.mlp.experts.{part}"
            blocks |= {f"{at}_blocks": codes, f"{at}_scales": scales}
            with torch.no_grad():
                weights.copy_(convert_moe_packed_tensors(codes, scales, dtype=torch.float32))
    save(model, folder)
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if f"{name}_blocks" not in blocks}
    save_file(kept | blocks, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["cut", "dealt"])
def test_mxfp4_is_widened_as_transformers_widens_it(expert_parallel: bool, tmp_path: Path) -> None:
    model = _save_as_published(tmp_path)
    source = open_model(str(tmp_path))
    assert source.spec.dtype == "float32"
    check(source, model, expert_parallel=expert_parallel)


def test_mxfp4_in_gguf(tmp_path: Path) -> None:
    model = _save_as_published(tmp_path)
    path = write_gguf(model, tmp_path / "model.gguf", experts="MXFP4")
    check(open_model(str(path)), model, expert_parallel=False)


def test_gguf_that_went_through_the_quantiser(tmp_path: Path) -> None:
    """llama.cpp drops the axis of 1 of the shared expert's gate."""
    model = tiny_model("qwen2_moe")
    weights = model.state_dict()
    for name in [name for name in weights if "shared_expert_gate" in name]:
        weights[name] = weights[name][0]
    path = write_gguf(model, tmp_path / "model.gguf", weights=weights)
    check(open_model(str(path)), model, expert_parallel=False)


def test_gguf_of_deepseek_before_its_kv_b_was_parted(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2")
    path = write_gguf(model, tmp_path / "model.gguf", kv_b_parted=False)
    check(open_model(str(path)), model, expert_parallel=False)


@pytest.mark.parametrize(("family", "first"), [("deepseek_v3", 2), ("qwen3_moe", 61)])
def test_layers_that_draft_are_left_alone(family: str, first: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    path = save(model, tmp_path) / "model.safetensors"
    drafting = {
        f"model.layers.{layer}.{name}.weight": torch.zeros(4, 8)
        for layer in (first, first + 1)
        for name in ("eh_proj", "enorm", "self_attn.q_proj", "mlp.experts.0.up_proj")
    }
    save_file(load_file(path) | drafting, path)
    check(open_model(str(tmp_path)), model, expert_parallel=False)


def test_other_layers_beyond_the_last_are_not(tmp_path: Path) -> None:
    path = save(tiny_model("deepseek_v3"), tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"model.layers.2.self_attn.o_proj.weight": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match=r"1 unused: model\.layers\.2\.self_attn"):
        open_model(str(tmp_path))
