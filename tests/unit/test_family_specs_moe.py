"""The families with experts: configs as published, their sizes, and what is refused."""

from __future__ import annotations

from math import log, prod
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shards.errors import UnsupportedModel
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.registry import family_of_config
from shards.models.spec import (
    Attention,
    Clamp,
    LatentAttention,
    MixtureOfExperts,
    ModelSpec,
    Router,
    YarnScaling,
)

GPT_OSS_ROPE = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
DEEPSEEK_ROPE = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
QWEN3_30B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "sliding_window": None,
}
DEEPSEEK_V2 = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
    "max_position_embeddings": 163840,
    "rope_scaling": DEEPSEEK_ROPE | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
}
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
# Model -> model_type, what its config.json states beyond the defaults, parameters as published.
PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "Mixtral 8x7B": ("mixtral", {"rope_theta": 1e6, "max_position_embeddings": 32768}, 46.7e9),
    "Mixtral 8x22B": (
        "mixtral",
        {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}
        | {"num_attention_heads": 48, "max_position_embeddings": 65536},
        140.6e9,
    ),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", {"max_window_layers": 21, "rope_theta": 1e6}, 14.3e9),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "moe_intermediate_size": 2560}
        | {"num_experts": 64, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480},
        57.4e9,
    ),
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3_30B, 30.5e9),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        QWEN3_30B
        | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
        | {"moe_intermediate_size": 1536, "intermediate_size": 12288},
        235.1e9,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {"num_hidden_layers": 24, "num_local_experts": 32, "rope_scaling": GPT_OSS_ROPE},
        20.9e9,
    ),
    "gpt-oss-120b": ("gpt_oss", {"rope_theta": 150000, "swiglu_limit": 7.0}, 116.8e9),
    "DeepSeek-V2-Lite": ("deepseek_v2", DEEPSEEK_V2_LITE, 15.7e9),
    "DeepSeek-V2": ("deepseek_v2", DEEPSEEK_V2, 235.7e9),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"max_position_embeddings": 163840, "rope_scaling": DEEPSEEK_ROPE, "ep_size": 1}
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        671.0e9,
    ),
}


def spec_of(model_type: str, **fields: Any) -> ModelSpec:
    config = {"model_type": model_type, **fields}
    return family_of_config(config).spec(config)


def published(model: str) -> ModelSpec:
    model_type, fields, _ = PUBLISHED[model]
    return spec_of(model_type, **fields)


def mixture(spec: ModelSpec) -> MixtureOfExperts:
    """Of the last layer."""
    ffn = spec.layers[-1].ffn
    assert isinstance(ffn, MixtureOfExperts)
    return ffn


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameter_count_is_the_published_one(model: str) -> None:
    model_type, fields, count = PUBLISHED[model]
    ours = sum(prod(parameter.shape) for parameter in parameters(published(model)))
    assert ours == pytest.approx(count, rel=2e-3)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(fields))
    # DeepSeek-V3's correction is a buffer.
    named = [*theirs.named_parameters(), *theirs.named_buffers()]
    assert ours == sum(t.numel() for name, t in named if not name.endswith("inv_freq"))


@pytest.mark.parametrize("model", PUBLISHED)
def test_spec_is_the_same_before_and_after_transformers(model: str) -> None:
    model_type, fields, _ = PUBLISHED[model]
    filled = CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()
    assert published(model) == spec_of(**filled)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mixtral", {"sliding_window": 100, "num_experts": 3}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 5}),
        ("qwen2_moe", {"mlp_only_layers": [0, 5], "decoder_sparse_step": 3, "qkv_bias": False}),
        ("qwen2_moe", {"num_experts": 0}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 99, "num_experts": 9}),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 2}),
        ("gpt_oss", {"sliding_window": None}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}),
        ("deepseek_v2", {"num_experts_per_tok": 6, "q_lora_rank": None, "rope_theta": 5e4}),
        ("deepseek_v3", {"first_k_dense_replace": 99, "rope_interleave": False}),
    ],
)
def test_odd_fields_mean_what_transformers_takes_them_for(
    model_type: str, fields: dict[str, Any]
) -> None:
    filled = CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()
    assert spec_of(model_type, **fields) == spec_of(**filled)


def test_routers() -> None:
    assert mixture(published("Mixtral 8x7B")).router == Router(2, renormalise=True)
    assert mixture(published("Qwen1.5-MoE-A2.7B")).router == Router(4)
    assert mixture(published("Qwen3-30B-A3B")).router == Router(8, renormalise=True)
    assert mixture(published("gpt-oss-20b")).router == Router(4, renormalise=True, bias=True)
    assert mixture(published("DeepSeek-V2-Lite")).router == Router(6)
    assert mixture(published("DeepSeek-V2")).router == Router(
        6, scale=16.0, groups=8, top_groups=3, group_score="best"
    )
    assert mixture(published("DeepSeek-V3")).router == Router(
        8,
        scores="sigmoid",
        renormalise=True,
        scale=2.5,
        correction=True,
        groups=8,
        top_groups=4,
        group_score="best two",
    )


def test_which_layers_have_experts() -> None:
    def sparse(spec: ModelSpec) -> list[int]:
        return [i for i, x in enumerate(spec.layers) if isinstance(x.ffn, MixtureOfExperts)]

    assert sparse(published("DeepSeek-V3")) == list(range(3, 61))
    qwen = {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert sparse(spec_of("qwen2_moe", **qwen)) == [1, 5, 7]
    assert sparse(spec_of("qwen3_moe", **qwen)) == [1, 5, 7]


def test_shared_experts() -> None:
    qwen, deepseek = (mixture(published(m)) for m in ("Qwen1.5-MoE-A2.7B", "DeepSeek-V2"))
    assert qwen.shared is not None
    assert deepseek.shared is not None
    assert (qwen.shared.width, qwen.shared_gate) == (5632, True)
    assert (deepseek.shared.width, deepseek.shared_gate) == (2 * 1536, False)


def test_gpt_oss_windows_sinks_and_clamp() -> None:
    spec = published("gpt-oss-20b")
    attention = [layer.attention for layer in spec.layers]
    assert all(isinstance(a, Attention) and a.sinks for a in attention)
    assert [a.window for a in attention] == [128, None] * 12
    expert = mixture(spec).expert
    assert (expert.bias, expert.clamp) == (True, Clamp(7.0, 1.702))
    rotary = attention[0].rotary
    assert rotary is not None
    assert rotary.scaling == YarnScaling(32.0, 4096, 0.1 * log(32) + 1, truncate=False)


def test_latent_attention_and_the_factor_of_yarn() -> None:
    attention = published("DeepSeek-V2").layers[0].attention
    assert isinstance(attention, LatentAttention)
    assert (attention.kv_heads, attention.head_dim, attention.query_rank) == (1, 576, 1536)
    assert (attention.rotary.dim, attention.rotary.interleaved) == (64, True)
    # cos and sin have none of the temperature, the scores all of it.
    assert attention.rotary.scaling == YarnScaling(40.0, 4096, 1.0)
    mscale = 0.1 * 0.707 * log(40) + 1
    assert attention.scale == pytest.approx(192**-0.5 * mscale**2)
    lite = published("DeepSeek-V2-Lite").layers[0].attention
    assert isinstance(lite, LatentAttention)
    assert lite.query_rank is None


def test_what_is_said_of_gpt4_needs_no_part_of_its_own() -> None:
    """1.8 trillion parameters: multi-query attention, and 16 experts of which a token takes 2."""
    spec = spec_of(
        "mixtral",
        hidden_size=12288,
        intermediate_size=2 * 12288,
        num_hidden_layers=120,
        num_attention_heads=128,
        num_key_value_heads=1,
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    assert sum(prod(p.shape) for p in parameters(spec)) == pytest.approx(1.8e12, rel=0.02)
    layout = make_layout(spec, 16, expert_parallel=True)
    assert [len(run) for run in layout.layers[0].experts] == [1] * 16
    assert [len(run) for run in layout.layers[0].heads] == [8] * 16
    assert [len(run) for run in layout.layers[0].kv_heads] == [1] * 16


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0: a whole number above 0"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts is 1000000: at most 4,096"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: a token has 8 experts"),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers is .*a list of layer numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit is 0.0: a number above 0"),
        ("gpt_oss", {"layer_types": ["chunked"] * 36}, "layer_types is 'chunked'"),
        ("deepseek_v2", {}, "num_experts_per_tok is None"),
        ("deepseek_v3", {"n_group": 7}, "n_routed_experts=256 and n_group=7: equal groups"),
        ("deepseek_v3", {"n_group": 256}, "n_group=256: equal groups are needed, of at least 2"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group is 9: at most 8"),
        ("deepseek_v3", {"num_experts_per_tok": 129}, "129: a token has 128 experts to choose"),
        ("deepseek_v3", {"scoring_func": "tanh"}, "scoring_func is 'tanh': known are softmax, s"),
        ("deepseek_v3", {"topk_method": "best"}, "topk_method is 'best': known are greedy"),
        ("deepseek_v3", {"attention_bias": "both"}, "attention_bias is 'both': true or false"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads=8: every head has keys"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
        ("deepseek_v2", {"norm_topk_prob": True, "num_experts_per_tok": 6}, "norm_topk_prob is T"),
    ],
)
def test_refused_with_field_and_value(model_type: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        spec_of(model_type, **fields)
