"""OPT: learned positions that start at row 2, ReLU, biases. The 350M model norms its residual
stream, has no norm at its end, and embeddings narrower than its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields
from shards.models.families.names import sources
from shards.models.family import Family
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    LearnedPositions,
    ModelSpec,
    Norm,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
# Rows 0 and 1 belonged to padding in the code that the models were trained with.
_FIRST_POSITION = 2
_EPS = 1e-5

_NAMES = {
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "embedding_projection": "model.decoder.project_in",
    "output_projection": "model.decoder.project_out",
    "layers.{i}.attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention_stream_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention.q": "model.decoder.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.decoder.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.decoder.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.out": "model.decoder.layers.{i}.self_attn.out_proj",
    "layers.{i}.ffn_norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers.{i}.ffn_stream_norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers.{i}.ffn.up": "model.decoder.layers.{i}.fc1",
    "layers.{i}.ffn.down": "model.decoder.layers.{i}.fc2",
    "norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    if not fields.flag("layer_norm_elementwise_affine"):
        raise UnsupportedModel(
            "config field layer_norm_elementwise_affine is False: only norms with weights are known"
        )
    pre_norm = fields.flag("do_layer_norm_before")
    width, embedded = fields.integer("hidden_size"), fields.get("word_embed_proj_dim")
    if embedded is not None:
        embedded = fields.integer("word_embed_proj_dim")
    heads = fields.heads("num_attention_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    bias = fields.flag("enable_bias")
    layer = Layer(
        Attention(heads, heads, head_dim, scale=head_dim**-0.5, qkv_bias=bias, out_bias=bias),
        FeedForward(
            fields.integer("ffn_dim"), fields.activation("activation_function"), False, bias
        ),
        pre_norm=pre_norm,
        stream_norm=not pre_norm,
    )
    context = fields.integer("max_position_embeddings")
    return ModelSpec(
        architecture="opt",
        width=width,
        vocabulary=fields.integer("vocab_size"),
        context=context,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", _EPS, bias=True),
        positions=LearnedPositions(context + _FIRST_POSITION, offset=_FIRST_POSITION),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        embedding_width=None if embedded == width else embedded,
        final_norm=pre_norm and not fields.flag("_remove_final_layer_norm"),
    )


FAMILY = Family(
    name="OPT",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=(r"lm_head\.weight",),  # a tied second copy of the embedding
)
