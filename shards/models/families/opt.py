"""OPT, all sizes but 350M: learned positions that start at row 2, ReLU, biases."""

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
    "layers.{i}.attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "layers.{i}.attention.q": "model.decoder.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.decoder.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.decoder.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.out": "model.decoder.layers.{i}.self_attn.out_proj",
    "layers.{i}.ffn_norm": "model.decoder.layers.{i}.final_layer_norm",
    "layers.{i}.ffn.up": "model.decoder.layers.{i}.fc1",
    "layers.{i}.ffn.down": "model.decoder.layers.{i}.fc2",
    "norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
}


def _refuse_350m(fields: Fields) -> None:
    """What OPT-350M has and no other size: norms of the residual stream, none at its end, and
    embeddings narrower than the layers."""
    for name, known in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ):
        if fields.flag(name) is not known:
            raise UnsupportedModel(f"config field {name} is {not known}: only {known} is known")
    width = fields.integer("hidden_size")
    if fields.get("word_embed_proj_dim") not in (None, width):
        raise UnsupportedModel(
            f"config field word_embed_proj_dim is {fields.get('word_embed_proj_dim')!r}: only "
            f"embeddings as wide as hidden_size={width} are known"
        )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    _refuse_350m(fields)
    heads = fields.heads("num_attention_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    bias = fields.flag("enable_bias")
    layer = Layer(
        Attention(heads, heads, head_dim, scale=head_dim**-0.5, qkv_bias=bias, out_bias=bias),
        FeedForward(
            fields.integer("ffn_dim"), fields.activation("activation_function"), False, bias
        ),
    )
    context = fields.integer("max_position_embeddings")
    return ModelSpec(
        architecture="opt",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", _EPS, bias=True),
        positions=LearnedPositions(context + _FIRST_POSITION, offset=_FIRST_POSITION),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
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
