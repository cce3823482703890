"""Phi-3 and Phi-4: Llama's modules, with q, k, v fused into one tensor and gate, up into another,
and long contexts by LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.fused import gate_up_in_turn, qkv_in_turn
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_partial, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, LongRopeScaling, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    turned = rotary(fields, head_dim, partial=True)
    if not (turned.scaling is None or isinstance(turned.scaling, LongRopeScaling)):
        raise UnsupportedModel(
            f"config field rope_scaling is {config.get('rope_scaling')!r:.80}: Phi-3 is known "
            "with longrope (or su) and without any"
        )
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            window=fields.window("sliding_window", longest),
            rotary=turned,
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
    )
    return ModelSpec(
        architecture="phi3",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    names = {
        **llama.NAMES,
        **qkv_in_turn(spec, "model.layers.{i}.self_attn.qkv_proj"),
        **gate_up_in_turn(spec, "model.layers.{i}.mlp.gate_up_proj"),
    }
    return sources(spec, names)


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    optional = llama.GGUF_OPTIONAL | {
        "sliding_window": "attention.sliding_window",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
    }
    config = gguf_fields(metadata, "phi3", llama.GGUF_REQUIRED, optional)
    if not config.get("sliding_window"):
        config["sliding_window"] = None  # written as 0 where there is none
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config["partial_rotary_factor"] = gguf_partial(metadata, "phi3", head_dim)
    return config


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    names = {
        **llama.GGUF_NAMES,
        **qkv_in_turn(spec, "blk.{i}.attn_qkv"),
        **gate_up_in_turn(spec, "blk.{i}.ffn_up"),
    }
    return sources(spec, names)


FAMILY = Family(
    name="Phi-3, Phi-4",
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    spec=_spec,
    sources=_sources,
    prefix="model.",
    ignored=(*llama.IGNORED, r"rope_factors_(long|short)\.weight"),
    gguf=GGUFNames("phi3", _gguf_config, _gguf_sources),
)
