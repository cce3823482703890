"""GPT-OSS: attention sinks, a window in every other layer, experts with biases, clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from shards.models.families import experts, llama
from shards.models.families.experts import expert_count, top_k
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import (
    Attention,
    Clamp,
    FeedForward,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
    Router,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "attention_bias": True,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_ABSENT = {"sliding_window": 128}  # null means none
_ALIASES = {"num_local_experts": "num_experts"}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES, _ABSENT)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        rotary=rotary(fields, head_dim),
        sinks=True,
    )
    count = expert_count(fields, "num_local_experts")
    mixture = MixtureOfExperts(
        count,
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation="silu",
            gated=True,
            bias=True,
            clamp=Clamp(fields.number("swiglu_limit"), fields.number("swiglu_alpha")),
        ),
        Router(top_k(fields, "num_experts_per_tok", count), renormalise=True, bias=True),
    )
    full = Layer(attention, mixture)
    window = fields.window("sliding_window", longest)
    sliding = full if window is None else Layer(replace(attention, window=window), mixture)
    return ModelSpec(
        architecture="gpt_oss",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(
            sliding if slides else full for slides in fields.sliding_layers(lambda i: i % 2 == 0)
        ),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _names() -> dict[str, str | Source]:
    """All experts of a layer are in one tensor, gate and up in turn: as published blocks of MXFP4,
    [outputs, inputs] each, and as transformers trains and saves them [inputs, outputs]."""
    gate_up, down = (f"model.layers.{{i}}.mlp.experts.{part}_proj" for part in ("gate_up", "down"))
    names: dict[str, str | Source] = {
        **llama.NAMES,
        "layers.{i}.attention.sinks.weight": "model.layers.{i}.self_attn.sinks",
        "layers.{i}.router": "model.layers.{i}.mlp.router",
        "layers.{i}.experts.{e}.down.weight": Source(
            f"{down}_blocks",
            scales=f"{down}_scales",
            stacked=True,
            otherwise=Source(down, stacked=True, transpose=True),
        ),
        "layers.{i}.experts.{e}.down.bias": Source(f"{down}_bias", stacked=True),
    }
    for nth, part in enumerate(("gate", "up")):
        expert = f"layers.{{i}}.experts.{{e}}.{part}"
        in_turn = partial(Source, stacked=True, offset=nth, block=1, stride=2)
        names[f"{expert}.weight"] = in_turn(
            f"{gate_up}_blocks",
            scales=f"{gate_up}_scales",
            otherwise=in_turn(gate_up, transpose=True),
        )
        names[f"{expert}.bias"] = in_turn(f"{gate_up}_bias")
    return names


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = llama.GGUF_REQUIRED | {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
        "head_dim": "attention.key_length",
    }
    config = gguf_fields(metadata, "gpt-oss", required, llama.GGUF_OPTIONAL)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    scaling = gguf_scaling(metadata, "gpt-oss") or {"rope_type": "default"}
    # A file cannot say that the model was trained without rounding YaRN's borders.
    config["rope_scaling"] = scaling | {"truncate": False}
    return config


_GGUF_NAMES: dict[str, str | Source] = {
    **llama.GGUF_NAMES,
    **experts.GGUF_NAMES,
    "layers.{i}.attention.sinks": "blk.{i}.attn_sinks",
    "layers.{i}.ffn_norm": "blk.{i}.post_attention_norm",
}


FAMILY = Family(
    name="GPT-OSS",
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    spec=_spec,
    sources=lambda spec: sources(spec, _names()),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("gpt-oss", _gguf_config, lambda spec: sources(spec, _GGUF_NAMES)),
)
