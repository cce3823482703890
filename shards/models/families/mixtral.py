"""Mixtral: Mistral's attention, and in every layer experts of which a token takes the best two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import experts, llama
from shards.models.families.experts import expert_count, top_k
from shards.models.families.fields import Fields
from shards.models.families.names import sources
from shards.models.families.rope import context, rotary
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
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_ALIASES = {"num_local_experts": "num_experts"}

_NAMES = {
    **llama.NAMES,
    "layers.{i}.router": "model.layers.{i}.block_sparse_moe.gate",
    "layers.{i}.experts.{e}.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "layers.{i}.experts.{e}.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "layers.{i}.experts.{e}.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    count = expert_count(fields, "num_local_experts")
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            window=fields.window("sliding_window", longest),
            rotary=rotary(fields, head_dim),
        ),
        MixtureOfExperts(
            count,
            FeedForward(
                width=fields.integer("intermediate_size"),
                activation=fields.activation("hidden_act"),
                gated=True,
            ),
            Router(top_k(fields, "num_experts_per_tok", count), renormalise=True),
        ),
    )
    return ModelSpec(
        architecture="mixtral",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    further = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    return llama.gguf_config(metadata, further)


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """Files of before April 2024 have a tensor for each expert."""
    apart = {
        f"layers.{{i}}.experts.{{e}}.{part}": Source(
            f"blk.{{i}}.ffn_{part}_exps",
            stacked=True,
            otherwise=Source(f"blk.{{i}}.ffn_{part}.{{e}}"),
        )
        for part in ("gate", "up", "down")
    }
    return llama.paired_gguf_sources(spec, experts.GGUF_NAMES | apart)


FAMILY = Family(
    name="Mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("llama", _gguf_config, _gguf_sources, experts=True),
)
