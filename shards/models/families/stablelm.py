"""StableLM 3B and StableLM 2: Llama's modules with LayerNorm and partly rotated heads; the 12B with
parallel halves, and a norm of its own for every head's queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_partial, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, QKNorm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
    "partial_rotary_factor": 0.25,
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.even_share("hidden_size", "num_attention_heads")
    eps, parallel = fields.number("layer_norm_eps"), fields.flag("use_parallel_residual")
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("use_qkv_bias"),
            rotary=rotary(fields, head_dim, partial=True),
            qk_norm=QKNorm(Norm("layer", eps), own=True) if fields.flag("qk_layernorm") else None,
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
        parallel=parallel,
        shared_norm=parallel,
    )
    return ModelSpec(
        architecture="stablelm",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", eps, bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    attention = spec.layers[0].attention
    return sources(
        spec,
        {
            **llama.NAMES,
            "layers.{i}.attention.q_norm": Source(
                "model.layers.{i}.self_attn.q_layernorm.norms.{part}", parts=attention.heads
            ),
            "layers.{i}.attention.k_norm": Source(
                "model.layers.{i}.self_attn.k_layernorm.norms.{part}", parts=attention.kv_heads
            ),
        },
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "layer_norm_eps": "attention.layer_norm_epsilon",
    }
    config = gguf_fields(metadata, "stablelm", required, {"rope_theta": "rope.freq_base"})
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config["partial_rotary_factor"] = gguf_partial(metadata, "stablelm", head_dim)
    return config


def _gguf_shown(tensors: Collection[str]) -> dict[str, Any]:
    """The metadata's use_parallel_residual is wrong in files of models that state none."""
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
    }


def _gguf_sources(spec: ModelSpec) -> dict[str, Source]:
    attention = spec.layers[0].attention
    norms = {
        "layers.{i}.attention.q_norm": Source("blk.{i}.attn_q_norm", parts=attention.heads),
        "layers.{i}.attention.k_norm": Source("blk.{i}.attn_k_norm", parts=attention.kv_heads),
    }
    return sources(spec, {**llama.GGUF_NAMES, **norms})


FAMILY = Family(
    name="StableLM",
    architectures=("StableLmForCausalLM",),
    model_type="stablelm",
    spec=_spec,
    sources=_sources,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("stablelm", _gguf_config, _gguf_sources, _gguf_shown),
)
