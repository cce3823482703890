"""Mixtures of experts and latent attention; every one with its experts cut and with them dealt."""

from __future__ import annotations

from tests.parity.case import Case

_WORLDS = (1, 2, 3, 4)
# Far enough for the prompts (up to 41 tokens) to reach beyond the trained context.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

_MODELS = [
    Case("mixtral-5-experts", "mixtral", {}, _WORLDS),
    Case(
        "mixtral-window-untied",
        "mixtral",
        {"sliding_window": 13, "num_local_experts": 7, "num_experts_per_tok": 3},
        _WORLDS,
    ),
    # What is said of GPT-4: multi-query attention, 16 experts of which a token takes 2.
    Case(
        "gpt4-like",
        "mixtral",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "num_local_experts": 16},
        _WORLDS,
    ),
    Case("qwen2-moe-7-experts", "qwen2_moe", {}, _WORLDS),
    Case(
        "qwen2-moe-mixed-layers",
        "qwen2_moe",
        {
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 13,
            "max_window_layers": 2,
        },
        _WORLDS,
    ),
    Case("qwen3-moe-7-experts", "qwen3_moe", {"norm_topk_prob": True}, _WORLDS),
    Case(
        "qwen3-moe-mixed-layers-biased",
        "qwen3_moe",
        {"num_hidden_layers": 3, "decoder_sparse_step": 2, "attention_bias": True, "head_dim": 12},
        _WORLDS,
    ),
    Case("gpt-oss-5-experts", "gpt_oss", {}, _WORLDS),
    Case(
        "gpt-oss-windows",
        "gpt_oss",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "num_local_experts": 7,
            "num_experts_per_tok": 4,
            "rope_parameters": _YARN | {"truncate": False},
        },
        _WORLDS,
    ),
    Case("deepseek-v2-7-experts", "deepseek_v2", {"routed_scaling_factor": 1.5}, _WORLDS),
    Case(
        "deepseek-v2-groups-yarn",
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "n_routed_experts": 10,
            "topk_method": "group_limited_greedy",
            "n_group": 5,
            "topk_group": 2,
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        _WORLDS,
    ),
    Case(
        "deepseek-v3-15-experts",
        "deepseek_v3",
        {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        _WORLDS,
    ),
    Case("deepseek-v3-biased", "deepseek_v3", {"attention_bias": True}, _WORLDS),
    Case(
        "deepseek-v2-biased-whole-queries",
        "deepseek_v2",
        {"attention_bias": True, "q_lora_rank": None},
        _WORLDS,
    ),
    Case(
        "deepseek-v3-one-group",
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_routed_experts": 5,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
        },
        _WORLDS,
    ),
]
# Dealt to one rank, experts are as they are cut for one.
CASES = _MODELS + [
    case._replace(name=f"{case.name}-dealt", worlds=_WORLDS[1:], expert_parallel=True)
    for case in _MODELS
]
