"""Qwen3-MoE: Qwen3's attention, whose heads are normed, and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import experts, llama, qwen3
from shards.models.families.experts import expert_count, top_k
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.qwen2_moe import GGUF_EXPERTS, sparse_layers
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    QKNorm,
    Router,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}
_ALIASES = {"num_experts": "num_local_experts"}

_NAMES = {**qwen3.NAMES, **experts.NAMES}
_GGUF_NAMES: dict[str, str | Source] = {**llama.GGUF_NAMES, **experts.GGUF_NAMES}


def _mixture(fields: Fields) -> MixtureOfExperts:
    count = expert_count(fields, "num_experts")
    return MixtureOfExperts(
        count,
        FeedForward(
            fields.integer("moe_intermediate_size"), fields.activation("hidden_act"), gated=True
        ),
        Router(
            top_k(fields, "num_experts_per_tok", count),
            renormalise=fields.flag("norm_topk_prob"),
        ),
    )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    norm = Norm("rms", fields.number("rms_norm_eps"))
    windowed = fields.flag("use_sliding_window")
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        window=fields.window("sliding_window", longest) if windowed else None,
        rotary=rotary(fields, head_dim),
        qk_norm=QKNorm(norm),
    )
    dense = FeedForward(
        fields.integer("intermediate_size"), fields.activation("hidden_act"), gated=True
    )
    sparse = sparse_layers(fields)
    layers = {
        has_experts: Layer(attention, _mixture(fields) if has_experts else dense)
        for has_experts in set(sparse)
    }
    return ModelSpec(
        architecture="qwen3_moe",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(layers[has_experts] for has_experts in sparse),
        norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp renormalises without asking, as every published Qwen3-MoE does."""
    optional = llama.GGUF_OPTIONAL | {"head_dim": "attention.key_length"}
    config = gguf_fields(metadata, "qwen3moe", llama.GGUF_REQUIRED | GGUF_EXPERTS, optional)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["rope_scaling"] = gguf_scaling(metadata, "qwen3moe")
    return config | {"norm_topk_prob": True}


FAMILY = Family(
    name="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("qwen3moe", _gguf_config, lambda spec: sources(spec, _GGUF_NAMES)),
)
