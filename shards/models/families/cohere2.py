"""Command R7B and Command A: Command R with windows, and positions in windowed layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.models.families import cohere, llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    longest, pattern = context(fields), fields.integer("sliding_window_pattern")
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
    )
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_act"),
        gated=True,
    )
    full = Layer(attention, ffn, parallel=True, shared_norm=True)
    sliding = replace(
        full,
        attention=replace(
            attention,
            window=fields.window("sliding_window", longest),
            rotary=rotary(fields, head_dim, interleaved=True),
        ),
    )
    return ModelSpec(
        architecture="cohere2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(
            sliding if slides else full
            for slides in fields.sliding_layers(lambda i: (i + 1) % pattern != 0)
        ),
        norm=Norm("layer", fields.number("layer_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        logit_scale=fields.number("logit_scale"),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    optional = llama.GGUF_OPTIONAL | {"sliding_window": "attention.sliding_window"}
    config = gguf_fields(metadata, "cohere2", cohere.GGUF_REQUIRED, optional)
    config["rope_scaling"] = gguf_scaling(metadata, "cohere2")
    return config


FAMILY = Family(
    name="Command R7B, Command A",
    architectures=("Cohere2ForCausalLM",),
    model_type="cohere2",
    spec=_spec,
    sources=lambda spec: sources(spec, llama.NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("cohere2", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
