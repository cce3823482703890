"""GPT-2, and with it every dense GPT-3-shaped config: learned positions, LayerNorm, biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    LearnedPositions,
    ModelSpec,
    Norm,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
NO_CROSS_ATTENTION = "only decoders without cross-attention are known"


def _layer(fields: Fields, index: int) -> Layer:
    head_dim = fields.even_share("n_embd", "n_head")
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights") else 1.0
    if fields.flag("scale_attn_by_inverse_layer_idx"):
        scale /= index + 1
    heads = fields.heads("n_head")
    return Layer(
        Attention(heads, heads, head_dim, scale, qkv_bias=True, out_bias=True),
        FeedForward(ffn_width(fields), fields.activation("activation_function"), False, bias=True),
    )


def ffn_width(fields: Fields) -> int:
    if fields.get("n_inner") is not None:
        return fields.integer("n_inner")
    return 4 * fields.integer("n_embd")


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, ALIASES)
    fields.refuse_flag("add_cross_attention", NO_CROSS_ATTENTION)
    count = fields.layers("n_layer")
    if fields.flag("scale_attn_by_inverse_layer_idx"):
        layers = tuple(_layer(fields, i) for i in range(count))
    else:
        layers = (_layer(fields, 0),) * count
    positions = fields.integer("n_positions")
    return ModelSpec(
        architecture="gpt2",
        width=fields.integer("n_embd"),
        vocabulary=fields.integer("vocab_size"),
        context=positions,
        layers=layers,
        norm=Norm("layer", fields.number("layer_norm_epsilon"), bias=True),
        positions=LearnedPositions(positions),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    """Conv1D keeps its weights [inputs, outputs]; c_attn is q, k and v side by side."""
    names: dict[str, str | Source] = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "layers.{i}.attention.out": Source("transformer.h.{i}.attn.c_proj", transpose=True),
        "layers.{i}.ffn_norm": "transformer.h.{i}.ln_2",
        "layers.{i}.ffn.up": Source("transformer.h.{i}.mlp.c_fc", transpose=True),
        "layers.{i}.ffn.down": Source("transformer.h.{i}.mlp.c_proj", transpose=True),
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    for nth, part in enumerate("qkv"):
        names[f"layers.{{i}}.attention.{part}"] = Source(
            "transformer.h.{i}.attn.c_attn", transpose=True, offset=nth * spec.width
        )
    return sources(spec, names)


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        "n_positions": "context_length",
        "n_embd": "embedding_length",
        "n_layer": "block_count",
        "n_head": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    }
    return gguf_fields(metadata, "gpt2", required, {"n_inner": "feed_forward_length"})


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """llama.cpp's converter transposes the Conv1D weights and leaves q, k and v fused."""
    names: dict[str, str | Source] = {
        "embedding": "token_embd",
        "positions": "position_embd",
        "layers.{i}.attention_norm": "blk.{i}.attn_norm",
        "layers.{i}.attention.out": "blk.{i}.attn_output",
        "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
        "layers.{i}.ffn.up": "blk.{i}.ffn_up",
        "layers.{i}.ffn.down": "blk.{i}.ffn_down",
        "norm": "output_norm",
        "output": "output",
    }
    for nth, part in enumerate("qkv"):
        names[f"layers.{{i}}.attention.{part}"] = Source(
            "blk.{i}.attn_qkv", offset=nth * spec.width
        )
    return sources(spec, names)


FAMILY = Family(
    name="GPT-2",
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    spec=_spec,
    sources=_sources,
    prefix="transformer.",
    # The causal mask, which old checkpoints save, and a tied second copy of the embedding.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    gguf=GGUFNames("gpt2", _gguf_config, _gguf_sources),
)
