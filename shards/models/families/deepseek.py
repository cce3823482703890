"""DeepSeek-V2 and V3, and what has their architecture (R1, Kimi-K2, Moonlight): latent attention,
dense layers first, then experts with shared ones beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import experts, llama
from shards.models.families.experts import expert_count, top_k
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary, score_factor
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import (
    FeedForward,
    LatentAttention,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    Router,
)

_V2: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_V3: dict[str, Any] = {
    **_V2,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
}
_ABSENT = {"q_lora_rank": 1536}  # null means queries that are not compressed
_ALIASES = {"n_routed_experts": "num_experts"}
# transformers norms the latents with this, whatever rms_norm_eps is.
_LATENT_EPS = 1e-6


def _attention(fields: Fields) -> LatentAttention:
    heads = fields.heads("num_attention_heads")
    if fields.get("num_key_value_heads") not in (None, heads):
        raise UnsupportedModel(
            f"config fields num_attention_heads={heads} and num_key_value_heads="
            f"{fields.get('num_key_value_heads')!r}: every head has keys of its own from the latent"
        )
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    return LatentAttention(
        heads=heads,
        latent=fields.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=fields.integer("v_head_dim"),
        scale=(nope + rope) ** -0.5 * score_factor(fields),
        norm=Norm("rms", _LATENT_EPS),
        rotary=rotary(fields, rope, interleaved=fields.flag("rope_interleave")),
        query_rank=fields.integer("q_lora_rank") if fields.get("q_lora_rank") is not None else None,
        bias=fields.flag("attention_bias"),
    )


def _router(fields: Fields, count: int) -> Router:
    scores = fields.choice("scoring_func", ("softmax", "sigmoid"))
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"))
    if scores == "softmax":
        fields.refuse_flag("norm_topk_prob", "implementations differ in what it means with softmax")
    groups = top_groups = 1
    if method != "greedy" and fields.get("n_group") is not None:
        groups = expert_count(fields, "n_group")
        top_groups = fields.integer("topk_group", groups)
    pairs = method == "noaux_tc" and groups > 1
    if count % groups or (pairs and count == groups):
        raise UnsupportedModel(
            f"config fields n_routed_experts={count} and n_group={groups}: equal groups are "
            f"needed, of at least {2 if pairs else 1}"
        )
    return Router(
        top_k=top_k(fields, "num_experts_per_tok", count // groups * top_groups),
        scores="sigmoid" if scores == "sigmoid" else "softmax",
        renormalise=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor"),
        correction=method == "noaux_tc",
        groups=groups,
        top_groups=top_groups,
        group_score="best two" if pairs else "best",
    )


def _spec(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, defaults, _ALIASES, _ABSENT)
    fields.refuse_flag("mlp_bias", "only FFNs without biases are known")
    if fields.integer("moe_layer_freq") != 1:
        raise UnsupportedModel(
            f"config field moe_layer_freq is {fields.get('moe_layer_freq')}: after the first dense "
            "layers only layers with experts are known (1)"
        )
    attention = _attention(fields)
    count = expert_count(fields, "n_routed_experts")
    activation, width = fields.activation("hidden_act"), fields.integer("moe_intermediate_size")
    mixture = MixtureOfExperts(
        count,
        FeedForward(width, activation, gated=True),
        _router(fields, count),
        shared=FeedForward(width * expert_count(fields, "n_shared_experts"), activation, True),
    )
    dense = Layer(attention, FeedForward(fields.integer("intermediate_size"), activation, True))
    layers = fields.layers("num_hidden_layers")
    first = min(layers, fields.integer("first_k_dense_replace", least=0))
    return ModelSpec(
        architecture="deepseek_v3" if mixture.router.correction else "deepseek_v2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(dense,) * first + (Layer(attention, mixture),) * (layers - first),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _latent(spec: ModelSpec) -> LatentAttention:
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttention)
    return attention


def _fused_kv(attention: LatentAttention, tensor: str) -> tuple[Source, Source]:
    """Each head's key channels, then its value channels."""
    nope, value = attention.nope_dim, attention.value_dim
    return (
        Source(tensor, block=nope, stride=nope + value),
        Source(tensor, offset=nope, block=value, stride=nope + value),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    attention, at = _latent(spec), "model.layers.{i}.self_attn"
    k_up, v_up = _fused_kv(attention, f"{at}.kv_b_proj")
    names: dict[str, str | Source] = {
        **llama.NAMES,
        **experts.NAMES,
        "layers.{i}.attention.q": f"{at}.q_proj"
        if attention.query_rank is None
        else f"{at}.q_b_proj",
        "layers.{i}.attention.q_down": f"{at}.q_a_proj",
        "layers.{i}.attention.q_norm": f"{at}.q_a_layernorm",
        "layers.{i}.attention.kv_down": f"{at}.kv_a_proj_with_mqa",
        "layers.{i}.attention.kv_norm": f"{at}.kv_a_layernorm",
        "layers.{i}.attention.k_up": k_up,
        "layers.{i}.attention.v_up": v_up,
        "layers.{i}.router.correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
        "layers.{i}.shared.gate": "model.layers.{i}.mlp.shared_experts.gate_proj",
        "layers.{i}.shared.up": "model.layers.{i}.mlp.shared_experts.up_proj",
        "layers.{i}.shared.down": "model.layers.{i}.mlp.shared_experts.down_proj",
    }
    return sources(spec, names)


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Both versions are "deepseek2" there: what tells them apart is in the fields."""
    required = llama.GGUF_REQUIRED | {
        "first_k_dense_replace": "leading_dense_block_count",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }
    optional = {
        "rope_theta": "rope.freq_base",
        "q_lora_rank": "attention.q_lora_rank",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
        "scoring_func": "expert_gating_func",
    }
    # Files of before April 2025 have a head's own dimensions where later ones have the latent's.
    later = "_mla" if "deepseek2.attention.key_length_mla" in metadata else ""
    required["qk_head_dim"] = f"attention.key_length{later}"
    required["v_head_dim"] = f"attention.value_length{later}"
    config = gguf_fields(metadata, "deepseek2", required, optional)
    config.setdefault("q_lora_rank", None)
    # What drafts further tokens lies behind the layers, and is counted with them.
    config["num_hidden_layers"] -= metadata.get("deepseek2.nextn_predict_layers", 0)
    config["qk_nope_head_dim"] = config.pop("qk_head_dim") - config["qk_rope_head_dim"]
    # llama.cpp's numbers; softmax where none is stated.
    scores = config.get("scoring_func", 1)
    config["scoring_func"] = {1: "softmax", 2: "sigmoid"}.get(scores, scores)
    config["topk_method"] = "noaux_tc" if scores == 2 else "group_limited_greedy"
    config["rope_scaling"] = _gguf_scaling(metadata)
    return config


def _gguf_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = gguf_scaling(metadata, "deepseek2")
    # A tenth of mscale_all_dim; every published model's mscale is the same.
    log_multiplier = metadata.get("deepseek2.rope.scaling.yarn_log_multiplier")
    if scaling is None or not log_multiplier:
        return scaling
    mscale = round(10 * log_multiplier, 6)  # the digits are those of float32
    return scaling | {"mscale": mscale, "mscale_all_dim": mscale}


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """The converter parts kv_b_proj, and transposes the keys' half head by head; at first it left
    it whole."""
    heads = _latent(spec).heads
    k_up, v_up = _fused_kv(_latent(spec), "blk.{i}.attn_kv_b")
    names: dict[str, str | Source] = {
        **llama.GGUF_NAMES,
        **experts.GGUF_NAMES,
        "layers.{i}.attention.q": "blk.{i}.attn_q"
        if _latent(spec).query_rank is None
        else "blk.{i}.attn_q_b",
        "layers.{i}.attention.q_down": "blk.{i}.attn_q_a",
        "layers.{i}.attention.q_norm": "blk.{i}.attn_q_a_norm",
        "layers.{i}.attention.kv_down": "blk.{i}.attn_kv_a_mqa",
        "layers.{i}.attention.kv_norm": "blk.{i}.attn_kv_a_norm",
        "layers.{i}.attention.k_up": Source(
            "blk.{i}.attn_k_b", parts=heads, transpose=True, otherwise=k_up
        ),
        "layers.{i}.attention.v_up": Source("blk.{i}.attn_v_b", parts=heads, otherwise=v_up),
        "layers.{i}.router.correction": "blk.{i}.exp_probs_b.bias",
    }
    return sources(spec, names)


V2 = Family(
    name="DeepSeek-V2",
    architectures=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    spec=partial(_spec, _V2),
    sources=_sources,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("deepseek2", _gguf_config, _gguf_sources),
)
V3 = Family(
    name="DeepSeek-V3",
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    spec=partial(_spec, _V3),
    sources=_sources,
    prefix="model.",
    ignored=llama.IGNORED,
)
