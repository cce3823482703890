"""OLMo 2: norms after each half alone, and one over all queries together, and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, QKNorm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

_NAMES = {
    **llama.NAMES,
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.ffn_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    norm = Norm("rms", fields.number("rms_norm_eps"))
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("attention_bias"),
            out_bias=fields.flag("attention_bias"),
            rotary=rotary(fields, head_dim),
            qk_norm=QKNorm(norm, joint=True),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
        pre_norm=False,
        post_norm=True,
    )
    return ModelSpec(
        architecture="olmo2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if metadata.get("olmo2.attention.sliding_window"):
        raise UnsupportedModel(
            "GGUF metadata olmo2.attention.sliding_window is "
            f"{metadata['olmo2.attention.sliding_window']}: OLMo 3, of which only OLMo 2 is known"
        )
    config = gguf_fields(metadata, "olmo2", llama.GGUF_REQUIRED, llama.GGUF_OPTIONAL)
    config["rope_scaling"] = gguf_scaling(metadata, "olmo2")
    return config


FAMILY = Family(
    name="OLMo 2",
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("olmo2", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
