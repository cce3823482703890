"""Falcon, GPT-NeoX, GPT-J, OPT, BLOOM, StableLM: specs, published sizes, refusals; the mask."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shards.errors import UnsupportedModel
from shards.models.mask import masked
from shards.models.parameters import parameters
from shards.models.source import load_spec
from shards.models.spec import Attention, LearnedPositions, Rotary
from tests.unit.test_family_specs import filled, spec_of

# config.json of published checkpoints, less what makes no difference here, and the number of
# parameters that their authors state, where they do. Tied embeddings count once.
_NEOX = {"vocab_size": 50304, "rotary_pct": 0.25, "rotary_emb_base": 10000}
FALCON_40B = {
    "new_decoder_architecture": True,
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
PUBLISHED: list[tuple[str, dict[str, Any], int | None]] = [
    (
        "gpt_neox",  # Pythia 70M
        _NEOX
        | {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"intermediate_size": 2048},
        70_426_624,
    ),
    (
        "gpt_neox",  # Pythia 6.9B
        _NEOX
        | {"vocab_size": 50432, "hidden_size": 4096, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "intermediate_size": 16384},
        6_857_302_016,
    ),
    ("gpt_neox", {"hidden_act": "gelu_fast", "use_parallel_residual": True}, 20_554_567_680),
    ("gptj", {"n_inner": None, "rotary": True, "scale_attn_weights": True}, 6_050_882_784),
    ("opt", {"word_embed_proj_dim": 768, "prefix": "</s>"}, 125_239_296),
    (
        "opt",  # OPT 6.7B
        {"hidden_size": 4096, "ffn_dim": 16384, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "word_embed_proj_dim": 4096},
        6_658_473_984,
    ),
    ("bloom", {"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}, 559_214_592),
    (
        "bloom",  # 176B
        {"n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "seq_length": 2048},
        176_247_271_424,
    ),
    ("falcon", {"num_kv_heads": 71, "multi_query": True}, 6_921_720_704),
    ("falcon", FALCON_40B, 41_303_293_952),
    (
        "falcon",  # Falcon 2 11B
        FALCON_40B
        | {"hidden_size": 4096, "num_attention_heads": 32, "num_ln_in_parallel_attn": 1}
        | {"ffn_hidden_size": 16384, "max_position_embeddings": 8192, "rope_theta": 500042.0}
        | {"tie_word_embeddings": False},
        None,
    ),
    ("stablelm", {"rope_theta": 10000, "rotary_scaling_factor": 1.0}, 2_795_443_200),
    (
        "stablelm",  # StableLM 2 1.6B
        {"vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632}
        | {"num_hidden_layers": 24, "use_qkv_bias": True},
        1_644_515_328,
    ),
    (
        "stablelm",  # StableLM 2 12B
        {"vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 13824}
        | {"num_hidden_layers": 40, "num_key_value_heads": 8, "qk_layernorm": True}
        | {"use_parallel_residual": True},
        None,
    ),
]


def attention_of(model_type: str, **fields: Any) -> Attention:
    attention = spec_of(model_type, **fields).layers[0].attention
    assert isinstance(attention, Attention)
    return attention


@pytest.mark.parametrize(("model_type", "fields", "stated"), PUBLISHED)
def test_published_sizes(model_type: str, fields: dict[str, Any], stated: int | None) -> None:
    count = sum(math.prod(p.shape) for p in parameters(spec_of(model_type, **fields)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(fields))
    assert count == sum(p.numel() for p in model.parameters())
    assert stated is None or count == stated


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((model_type, fields) for model_type, fields, _ in PUBLISHED),
        ("falcon", {"n_embed": 64, "num_attention_heads": 4, "ffn_hidden_size": 50}),
        ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
        ("falcon", {"rope_scaling": {"type": "linear", "factor": 2.0}, "activation": "relu"}),
        ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 5e5, "tie_word_embeddings": True}),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("gptj", {"hidden_size": 96, "num_attention_heads": 2, "n_inner": 50, "rotary_dim": 48}),
        ("opt", {"enable_bias": False, "activation_function": "gelu", "torch_dtype": "float16"}),
        ("bloom", {"num_hidden_layers": 3, "tie_word_embeddings": False, "pretraining_tp": 4}),
        ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 1e6}),
        ("stablelm", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_spec_is_the_same_before_and_after_transformers(
    model_type: str, fields: dict[str, Any]
) -> None:
    assert spec_of(model_type, **fields) == spec_of(**filled(model_type, fields))


@pytest.mark.parametrize(
    ("fields", "kv_heads", "parallel", "shared_norm"),
    [
        ({"num_kv_heads": 71}, 1, True, True),
        ({"multi_query": False}, 71, True, True),
        ({"parallel_attn": False}, 1, False, False),
        (FALCON_40B, 8, True, False),
        (FALCON_40B | {"num_ln_in_parallel_attn": 2, "multi_query": False}, 8, True, False),
        (FALCON_40B | {"num_ln_in_parallel_attn": 1}, 8, True, True),
        (FALCON_40B | {"num_kv_heads": None}, 128, True, False),
    ],
)
def test_falcon_of_every_generation(
    fields: dict[str, Any], kv_heads: int, parallel: bool, shared_norm: bool
) -> None:
    layer = spec_of("falcon", **fields).layers[0]
    assert layer.attention.kv_heads == kv_heads
    assert (layer.parallel, layer.shared_norm) == (parallel, shared_norm)


def test_alibi_takes_the_place_of_rotary_positions() -> None:
    falcon = attention_of("falcon", alibi=True)
    bloom = attention_of("bloom")
    assert (falcon.alibi, falcon.rotary) == (64**-0.5, None)
    assert (bloom.alibi, bloom.rotary) == (1.0, None)
    assert attention_of("falcon").alibi is None


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("falcon", {}, Rotary(10_000.0, 64)),
        ("gpt_neox", {}, Rotary(10_000.0, 24)),
        ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500.0}, Rotary(500.0, 96)),
        ("gptj", {}, Rotary(10_000.0, 64, interleaved=True)),
        ("stablelm", {"rope_theta": 1e6}, Rotary(1e6, 20)),
        ("stablelm", {"partial_rotary_factor": 0.4}, Rotary(10_000.0, 32)),
    ],
)
def test_rotated_channels(model_type: str, fields: dict[str, Any], expected: Rotary) -> None:
    assert attention_of(model_type, **fields).rotary == expected


def test_opt_positions_start_at_row_two() -> None:
    spec = spec_of("opt", max_position_embeddings=100)
    assert spec.positions == LearnedPositions(rows=102, offset=2)
    assert spec.context == 100


def test_bloom_without_a_stated_length_serves_the_trained_one() -> None:
    assert spec_of("bloom").context == 2048
    assert spec_of("bloom", seq_length=4096).context == 4096


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("falcon", {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads=1 without new_decod"),
        ("falcon", FALCON_40B | {"parallel_attn": False}, "parallel_attn is False with new_dec"),
        ("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2: 1, or with"),
        ("falcon", FALCON_40B | {"num_kv_heads": 3}, "num_kv_heads=3: the KV heads must divide"),
        ("gpt_neox", {"rotary_pct": 0.01}, "partial_rotary_factor is 0.01: of head_dim 96 that"),
        ("gpt_neox", {"rotary_pct": 0.22}, "partial_rotary_factor 0.22 of head_dim 96 is odd"),
        ("gptj", {"rotary_dim": None}, "rotary_dim is None"),
        ("gptj", {"rotary_dim": 63}, "rotary_dim is 63: an even number up to the head_dim of 256"),
        ("gptj", {"rotary_dim": 258}, "rotary_dim is 258: an even number"),
        ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0: a whole number above 0"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True",
        ),
        ("stablelm", {"num_key_value_heads": 5}, "num_key_value_heads=5: the KV heads must divide"),
        ("stablelm", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ],
)
def test_refused_with_field_and_value(model_type: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        spec_of(model_type, **fields)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "bloom", "stablelm"])
def test_any_config_may_name_the_prefix_mask(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "headwise_mask": "prefix"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(str(tmp_path))
    plain = spec_of(model_type)
    assert {layer.attention.mask for layer in spec.layers} == {"prefix"}  # type: ignore[union-attr]
    assert masked(plain, {"headwise_mask": "prefix"}) == spec
    assert masked(plain, {"headwise_mask": "causal"}) is masked(plain, {}) is plain


@pytest.mark.parametrize(
    ("model_type", "mask", "said"),
    [
        ("llama", "bidirectional", "headwise_mask is 'bidirectional': known are causal, prefix"),
        ("llama", True, "headwise_mask is True: known are"),
        ("mistral", "prefix", "headwise_mask is 'prefix' in a model with a sliding window of 4096"),
    ],
)
def test_mask_that_is_refused(model_type: str, mask: Any, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        masked(spec_of(model_type), {"headwise_mask": mask})
