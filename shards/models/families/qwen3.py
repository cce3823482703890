"""Qwen3, dense: Qwen2 without its biases, with a norm of each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.models.families import llama, qwen2
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, QKNorm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_ABSENT = {"num_key_value_heads": 32}  # a null one means as many as query heads

NAMES = {
    **llama.NAMES,
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, absent=_ABSENT)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim")
    longest = context(fields)
    windows = qwen2.windows(fields, longest)
    norm = Norm("rms", fields.number("rms_norm_eps"))
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        rotary=rotary(fields, head_dim),
        qk_norm=QKNorm(norm),
    )
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_act"),
        gated=True,
    )
    kinds = {window: Layer(replace(attention, window=window), ffn) for window in set(windows)}
    return ModelSpec(
        architecture="qwen3",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(kinds[window] for window in windows),
        norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    optional = llama.GGUF_OPTIONAL | {"head_dim": "attention.key_length"}
    config = gguf_fields(metadata, "qwen3", llama.GGUF_REQUIRED, optional)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["rope_scaling"] = gguf_scaling(metadata, "qwen3")
    return config


FAMILY = Family(
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    spec=_spec,
    sources=lambda spec: sources(spec, NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("qwen3", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
