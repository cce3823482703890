"""GPT-NeoX-20B, Pythia and what was trained with the same code: parallel halves, two norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.fused import qkv_by_kv_head, qkv_in_turn
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_partial, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.25,
}
_ALIASES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, _ALIASES)
    heads = fields.heads("num_attention_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    layer = Layer(
        Attention(
            heads,
            heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("attention_bias"),
            out_bias=fields.flag("attention_bias"),
            rotary=rotary(fields, head_dim, partial=True),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=False,
            bias=True,
        ),
        parallel=fields.flag("use_parallel_residual"),
    )
    return ModelSpec(
        architecture="gpt_neox",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", fields.number("layer_norm_eps"), bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    names = {
        "embedding": "gpt_neox.embed_in",
        "layers.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
        "layers.{i}.attention.out": "gpt_neox.layers.{i}.attention.dense",
        "layers.{i}.ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "layers.{i}.ffn.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "layers.{i}.ffn.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    }
    qkv = qkv_by_kv_head(spec, "gpt_neox.layers.{i}.attention.query_key_value")
    return sources(spec, {**names, **qkv})


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "layer_norm_eps": "attention.layer_norm_epsilon",
    }
    optional = {
        "use_parallel_residual": "use_parallel_residual",
        "rope_theta": "rope.freq_base",
    }
    config = gguf_fields(metadata, "gptneox", required, optional)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config["partial_rotary_factor"] = gguf_partial(metadata, "gptneox", head_dim)
    return config


def _gguf_shown(tensors: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_output.bias" in tensors}


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    """llama.cpp's converter puts all of q first, then k, then v."""
    return sources(spec, {**llama.GGUF_NAMES, **qkv_in_turn(spec, "blk.{i}.attn_qkv")})


FAMILY = Family(
    name="GPT-NeoX",
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    spec=_spec,
    sources=_sources,
    prefix="gpt_neox.",
    # The causal mask and the rotary frequencies, which old checkpoints save, and a tied output.
    ignored=(
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",
    ),
    gguf=GGUFNames("gptneox", _gguf_config, _gguf_sources, _gguf_shown),
)
