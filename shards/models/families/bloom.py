"""BLOOM and BLOOMZ: ALiBi instead of positions, and a norm right after the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.fused import qkv_by_kv_head, qkv_in_turn
from shards.models.families.names import gguf_fields, sources
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    # What it was trained on. ALiBi has no end of its own, and transformers knows no such field.
    "seq_length": 2048,
}
_ALIASES = {
    "hidden_size": "n_embed",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES)
    fields.refuse_flag(
        "apply_residual_connection_post_layernorm",
        "only a residual stream that no norm touches is known",
    )
    heads, width = fields.heads("n_head"), fields.integer("hidden_size")
    head_dim = fields.even_share("hidden_size", "n_head")
    layer = Layer(
        Attention(
            heads,
            heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=True,
            out_bias=True,
            alibi=1.0,
        ),
        FeedForward(4 * width, "gelu_tanh", gated=False, bias=True),
    )
    return ModelSpec(
        architecture="bloom",
        width=width,
        vocabulary=fields.integer("vocab_size"),
        context=fields.integer("seq_length"),
        layers=(layer,) * fields.layers("n_layer"),
        norm=Norm("layer", fields.number("layer_norm_epsilon"), bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        embedding_norm=True,
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    names = {
        "embedding": "transformer.word_embeddings",
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "layers.{i}.attention_norm": "transformer.h.{i}.input_layernorm",
        "layers.{i}.attention.out": "transformer.h.{i}.self_attention.dense",
        "layers.{i}.ffn_norm": "transformer.h.{i}.post_attention_layernorm",
        "layers.{i}.ffn.up": "transformer.h.{i}.mlp.dense_h_to_4h",
        "layers.{i}.ffn.down": "transformer.h.{i}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    qkv = qkv_by_kv_head(spec, "transformer.h.{i}.self_attention.query_key_value")
    return sources(spec, {**names, **qkv})


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        "seq_length": "context_length",
        "hidden_size": "embedding_length",
        "n_layer": "block_count",
        "n_head": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    }
    return gguf_fields(metadata, "bloom", required, {})


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """llama.cpp's converter puts all of q first, then k, then v."""
    names = {**llama.GGUF_NAMES, "embedding_norm": "token_embd_norm"}
    return sources(spec, {**names, **qkv_in_turn(spec, "blk.{i}.attn_qkv")})


FAMILY = Family(
    name="BLOOM",
    architectures=("BloomForCausalLM",),
    model_type="bloom",
    spec=_spec,
    sources=_sources,
    prefix="transformer.",
    ignored=(r"lm_head\.weight",),  # a tied second copy of the embedding
    gguf=GGUFNames("bloom", _gguf_config, _gguf_sources),
)
