"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts, and one that is shared and gated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import experts, llama
from shards.models.families.experts import expert_count, top_k
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    Router,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
}

_NAMES = {
    **llama.NAMES,
    **experts.NAMES,
    "layers.{i}.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
    "layers.{i}.shared.gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "layers.{i}.shared.up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "layers.{i}.shared.down": "model.layers.{i}.mlp.shared_expert.down_proj",
}
_GGUF_NAMES: dict[str, str | Source] = {
    **llama.GGUF_NAMES,
    **experts.GGUF_NAMES,
    "layers.{i}.shared_gate": "blk.{i}.ffn_gate_inp_shexp",
}
GGUF_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def sparse_layers(fields: Fields) -> list[bool]:
    """Whether each layer has experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    layers = fields.layers("num_hidden_layers")
    step = fields.integer("decoder_sparse_step")
    dense = fields.get("mlp_only_layers")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise UnsupportedModel(
            f"config field mlp_only_layers is {dense!r:.80}: a list of layer numbers is needed"
        )
    any_experts = expert_count(fields, "num_experts", least=0) > 0
    return [any_experts and i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _windows(fields: Fields, longest: int) -> list[int | None]:
    """Each layer's window: of those before `max_window_layers` every other, or as `layer_types`
    says."""
    if not fields.flag("use_sliding_window"):
        return [None] * fields.layers("num_hidden_layers")
    window = fields.window("sliding_window", longest)
    before = fields.integer("max_window_layers", least=0)
    sliding = fields.sliding_layers(lambda i: i % 2 == 0 and i < before)
    return [window if slides else None for slides in sliding]


def _dense(fields: Fields, width: str) -> FeedForward:
    return FeedForward(fields.integer(width), fields.activation("hidden_act"), gated=True)


def _mixture(fields: Fields) -> MixtureOfExperts:
    count = expert_count(fields, "num_experts")
    return MixtureOfExperts(
        count,
        _dense(fields, "moe_intermediate_size"),
        Router(
            top_k(fields, "num_experts_per_tok", count),
            renormalise=fields.flag("norm_topk_prob"),
        ),
        shared=_dense(fields, "shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.flag("qkv_bias"),
        rotary=rotary(fields, head_dim),
    )
    kinds = list(zip(_windows(fields, longest), sparse_layers(fields), strict=True))
    layers = {
        (window, sparse): Layer(
            replace(attention, window=window),
            _mixture(fields) if sparse else _dense(fields, "intermediate_size"),
        )
        for window, sparse in set(kinds)
    }
    return ModelSpec(
        architecture="qwen2_moe",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(layers[kind] for kind in kinds),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        **llama.GGUF_REQUIRED,
        **GGUF_EXPERTS,
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    }
    config = gguf_fields(metadata, "qwen2moe", required, llama.GGUF_OPTIONAL)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["rope_scaling"] = gguf_scaling(metadata, "qwen2moe")
    return config


FAMILY = Family(
    name="Qwen2-MoE",
    architectures=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("qwen2moe", _gguf_config, lambda spec: sources(spec, _GGUF_NAMES)),
)
