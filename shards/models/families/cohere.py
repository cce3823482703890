"""Command R and R+: parallel halves behind one LayerNorm, neighbouring channels rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, QKNorm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_qk_norm": False,
    "logit_scale": 0.0625,
}

GGUF_REQUIRED = {
    **{name: key for name, key in llama.GGUF_REQUIRED.items() if name != "rms_norm_eps"},
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "logit_scale": "logit_scale",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    norm = Norm("layer", fields.number("layer_norm_eps"))
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("attention_bias"),
            out_bias=fields.flag("attention_bias"),
            rotary=rotary(fields, head_dim, interleaved=True),
            qk_norm=QKNorm(norm, own=True) if fields.flag("use_qk_norm") else None,
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
        parallel=True,
        shared_norm=True,
    )
    return ModelSpec(
        architecture="cohere",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        logit_scale=fields.number("logit_scale"),
    )


def _with_head_norms(spec: ModelSpec, names: Mapping[str, str], layer: str) -> dict[str, Source]:
    """The norms of queries and keys are stored [heads, head_dim]."""
    attention = spec.layers[0].attention
    norms = {
        "layers.{i}.attention.q_norm": Source(f"{layer}q_norm", parts=attention.heads),
        "layers.{i}.attention.k_norm": Source(f"{layer}k_norm", parts=attention.kv_heads),
    }
    return sources(spec, {**names, **norms})


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    config = gguf_fields(metadata, "command-r", GGUF_REQUIRED, llama.GGUF_OPTIONAL)
    config["rope_scaling"] = gguf_scaling(metadata, "command-r")
    return config


FAMILY = Family(
    name="Command R",
    architectures=("CohereForCausalLM",),
    model_type="cohere",
    spec=_spec,
    sources=lambda spec: _with_head_norms(spec, llama.NAMES, "model.layers.{i}.self_attn."),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames(
        "command-r",
        _gguf_config,
        lambda spec: _with_head_norms(spec, llama.GGUF_NAMES, "blk.{i}.attn_"),
    ),
)
