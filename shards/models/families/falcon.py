"""Falcon 7B (one KV head), 40B, 180B and 11B (the new decoder), and Falcon-RW (ALiBi)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.fused import qkv_by_kv_head, qkv_in_turn
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
_ALIASES = {"hidden_size": "n_embed"}

_GGUF_SECOND_NORM = "blk.0.attn_norm_2.weight"


def _kv_heads(fields: Fields, heads: int) -> int:
    """`num_kv_heads` means something in the new decoder alone; Falcon 7B's config states 71."""
    stated = fields.head_counts("num_attention_heads", "num_kv_heads")[1]
    if fields.flag("new_decoder_architecture"):
        return stated
    if fields.flag("multi_query"):
        return 1
    if stated != heads:
        raise UnsupportedModel(
            f"config fields multi_query=False and num_kv_heads={stated} without "
            f"new_decoder_architecture: as many KV heads as the {heads} query heads are needed"
        )
    return heads


def _shares_norm(fields: Fields) -> bool:
    """Whether the parallel halves have one norm, as all but the first models of the new decoder."""
    new = fields.flag("new_decoder_architecture")
    norms = fields.get("num_ln_in_parallel_attn")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise UnsupportedModel(
            f"config field num_ln_in_parallel_attn is {norms!r}: 1, or with "
            "new_decoder_architecture also 2, is known"
        )
    return not new or norms == 1


def _layer(fields: Fields) -> Layer:
    heads = fields.heads("num_attention_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    alibi, bias, parallel = (fields.flag(name) for name in ("alibi", "bias", "parallel_attn"))
    if not parallel and fields.flag("new_decoder_architecture"):
        raise UnsupportedModel(
            "config field parallel_attn is False with new_decoder_architecture: "
            "the new decoder's halves are parallel"
        )
    width = "hidden_size" if fields.get("ffn_hidden_size") is None else "ffn_hidden_size"
    return Layer(
        Attention(
            heads,
            _kv_heads(fields, heads),
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            rotary=None if alibi else rotary(fields, head_dim),
            # Added to the logits before they are scaled. transformers rounds these biases to
            # bfloat16, which makes positions beyond 256 equal to their neighbours; not done here.
            alibi=head_dim**-0.5 if alibi else None,
        ),
        FeedForward(
            width=fields.integer(width) * (4 if width == "hidden_size" else 1),
            activation=fields.activation("activation"),
            gated=False,
            bias=bias,
        ),
        parallel=parallel,
        shared_norm=parallel and _shares_norm(fields),
    )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES)
    return ModelSpec(
        architecture="falcon",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(_layer(fields),) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", fields.number("layer_norm_epsilon"), bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    layer = spec.layers[0]
    first = "ln_attn" if layer.parallel and not layer.shared_norm else "input_layernorm"
    second = "ln_mlp" if layer.parallel else "post_attention_layernorm"
    names = {
        "embedding": "transformer.word_embeddings",
        "layers.{i}.attention_norm": f"transformer.h.{{i}}.{first}",
        "layers.{i}.attention.out": "transformer.h.{i}.self_attention.dense",
        "layers.{i}.ffn_norm": f"transformer.h.{{i}}.{second}",
        "layers.{i}.ffn.up": "transformer.h.{i}.mlp.dense_h_to_4h",
        "layers.{i}.ffn.down": "transformer.h.{i}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    qkv = qkv_by_kv_head(spec, "transformer.h.{i}.self_attention.query_key_value")
    return sources(spec, {**names, **qkv})


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Falcon 7B is the new decoder with one KV head and one norm."""
    required = {
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    }
    optional = {"ffn_hidden_size": "feed_forward_length", "rope_theta": "rope.freq_base"}
    config = gguf_fields(metadata, "falcon", required, optional)
    kv_heads = metadata.get("falcon.attention.head_count_kv", 1)
    return config | {"new_decoder_architecture": True, "num_kv_heads": kv_heads}


def _gguf_shown(tensors: Collection[str]) -> dict[str, Any]:
    return {"num_ln_in_parallel_attn": 2 if _GGUF_SECOND_NORM in tensors else 1}


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """llama.cpp's converter puts all of q first, then k, then v. Where there are two norms, the
    second is the attention's."""
    names = {**llama.GGUF_NAMES, "layers.{i}.ffn_norm": "blk.{i}.attn_norm"}
    if not spec.layers[0].shared_norm:
        names["layers.{i}.attention_norm"] = "blk.{i}.attn_norm_2"
    return sources(spec, {**names, **qkv_in_turn(spec, "blk.{i}.attn_qkv")})


FAMILY = Family(
    name="Falcon",
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    spec=_spec,
    sources=_sources,
    prefix="transformer.",
    # A tied second copy of the embedding, and the rotary frequencies of old checkpoints.
    ignored=(r"lm_head\.weight", r"h\.\d+\.self_attention\.rotary(_emb)?\.inv_freq"),
    gguf=GGUFNames("falcon", _gguf_config, _gguf_sources, _gguf_shown),
)
