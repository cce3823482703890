"""Gemma 2: norms before and after each half, capped logits, every second layer windowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_ABSENT = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
NO_BIDIRECTIONAL = "only causal attention is known"


def unit_offset(tensor: str) -> Source:
    """A Gemma norm, which multiplies by 1 + weight."""
    return Source(tensor, add=1.0)


NAMES: dict[str, str | Source] = {
    **llama.NAMES,
    "layers.{i}.attention_norm": unit_offset("model.layers.{i}.input_layernorm"),
    "layers.{i}.attention_post_norm": unit_offset("model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.ffn_norm": unit_offset("model.layers.{i}.pre_feedforward_layernorm"),
    "layers.{i}.ffn_post_norm": unit_offset("model.layers.{i}.post_feedforward_layernorm"),
    "norm": unit_offset("model.norm"),
}

GGUF_OPTIONAL = llama.GGUF_OPTIONAL | {
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, absent=_ABSENT)
    fields.refuse_flag("use_bidirectional_attention", NO_BIDIRECTIONAL)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim")
    width, longest = fields.integer("hidden_size"), context(fields)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        rotary=rotary(fields, head_dim),
        softcap=fields.number_or_none("attn_logit_softcapping"),
    )
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_activation"),
        gated=True,
    )
    full = Layer(attention, ffn, post_norm=True)
    sliding = replace(
        full, attention=replace(attention, window=fields.window("sliding_window", longest))
    )
    return ModelSpec(
        architecture="gemma2",
        width=width,
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(
            sliding if slides else full for slides in fields.sliding_layers(lambda i: i % 2 == 0)
        ),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        embedding_scale=width**0.5,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def query_scalar(config: Mapping[str, Any], largest: int) -> int:
    """`query_pre_attn_scalar`, which GGUF does not state: it is the head_dim, but in the largest
    model, which is told by its number of layers, the width of a query head's even share."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_dim", 256))


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    config = gguf_fields(metadata, "gemma2", llama.GGUF_REQUIRED, GGUF_OPTIONAL)
    config["query_pre_attn_scalar"] = query_scalar(config, largest=46)
    return config


FAMILY = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    spec=_spec,
    sources=lambda spec: sources(spec, NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    # llama.cpp's converter adds the 1 to the norms.
    gguf=GGUFNames("gemma2", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
