"""GLM-4 of 2024: half of each head rotated in neighbouring pairs, gate and up fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.fused import gate_up_in_turn
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_partial, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}

GATE_UP = "model.layers.{i}.mlp.gate_up_proj"


def glm_spec(config: Mapping[str, Any], architecture: str, *, post_norm: bool) -> ModelSpec:
    """The spec of a GLM: `post_norm` is what the models of 2025 have in addition."""
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim")
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("attention_bias"),
            rotary=rotary(fields, head_dim, partial=True, interleaved=True),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
        post_norm=post_norm,
    )
    return ModelSpec(
        architecture=architecture,
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def gguf_config(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The config of a GLM from its GGUF metadata."""
    optional = llama.GGUF_OPTIONAL | {"head_dim": "attention.key_length"}
    config = gguf_fields(metadata, architecture, llama.GGUF_REQUIRED, optional)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["partial_rotary_factor"] = gguf_partial(metadata, architecture, config["head_dim"])
    config["rope_scaling"] = gguf_scaling(metadata, architecture)
    return config


def gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """The converter leaves rows as they are: llama.cpp turns neighbouring pairs, as GLM does."""
    return sources(spec, {**llama.GGUF_NAMES, **gate_up_in_turn(spec, "blk.{i}.ffn_up")})


def _sources(spec: ModelSpec) -> dict[str, Source]:
    return sources(spec, {**llama.NAMES, **gate_up_in_turn(spec, GATE_UP)})


FAMILY = Family(
    name="GLM-4 (2024)",
    architectures=("GlmForCausalLM",),
    model_type="glm",
    spec=lambda config: glm_spec(config, "glm", post_norm=False),
    sources=_sources,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("chatglm", lambda metadata: gguf_config(metadata, "chatglm"), gguf_sources),
)
