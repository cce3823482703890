"""Llama 1, 2 and 3, and whatever says it is one: TinyLlama, SmolLM2, Vicuna."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

NAMES = {
    "embedding": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.ffn.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.ffn.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.ffn.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "output": "lm_head",
}

GGUF_NAMES = {
    "embedding": "token_embd",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.q": "blk.{i}.attn_q",
    "layers.{i}.attention.k": "blk.{i}.attn_k",
    "layers.{i}.attention.v": "blk.{i}.attn_v",
    "layers.{i}.attention.out": "blk.{i}.attn_output",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.ffn.gate": "blk.{i}.ffn_gate",
    "layers.{i}.ffn.up": "blk.{i}.ffn_up",
    "layers.{i}.ffn.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "output": "output",
    # What Llama has not and its successors have: GGUF has one name for a thing.
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.attention_post_norm": "blk.{i}.post_attention_norm",
    "layers.{i}.ffn_post_norm": "blk.{i}.post_ffw_norm",
}

# Old checkpoints save the rotary frequencies, tied ones a second copy of the embedding.
IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")

GGUF_REQUIRED = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
GGUF_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
}


def llama_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Llama; Granite is one with multipliers."""
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    layer = Layer(
        Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=fields.flag("attention_bias"),
            out_bias=fields.flag("attention_bias"),
            rotary=rotary(fields, head_dim),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
            bias=fields.flag("mlp_bias"),
        ),
    )
    return ModelSpec(
        architecture="llama",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context(fields),
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def gguf_config(
    metadata: Mapping[str, Any], further: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Of a "llama" file; `further` are the keys that it must have beside Llama's."""
    optional = GGUF_OPTIONAL | {"head_dim": "attention.key_length"}
    config = gguf_fields(metadata, "llama", {**GGUF_REQUIRED, **(further or {})}, optional)
    config["rope_scaling"] = gguf_scaling(metadata, "llama")
    turned = metadata.get("llama.rope.dimension_count")
    if turned is not None and config.setdefault("head_dim", turned) != turned:
        raise UnsupportedModel(
            f"GGUF metadata llama.rope.dimension_count is {turned} and the head_dim is "
            f"{config['head_dim']}: only rotation of whole heads is known"
        )
    return config


def paired_gguf_sources(
    spec: ModelSpec, further: Mapping[str, str | Source] | None = None
) -> dict[str, Source]:
    """llama.cpp turns neighbouring channels and therefore stores the rows of q and k pairwise."""
    head_dim = spec.layers[0].attention.head_dim
    names: dict[str, str | Source] = {**GGUF_NAMES, **(further or {})}
    for module in ("layers.{i}.attention.q", "layers.{i}.attention.k"):
        names[module] = Source(GGUF_NAMES[module], rope_rows=head_dim)
    return sources(spec, names)


FAMILY = Family(
    name="Llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    spec=llama_spec,
    sources=lambda spec: sources(spec, NAMES),
    prefix="model.",
    ignored=(*IGNORED, r"rope_freqs\.weight"),
    gguf=GGUFNames("llama", gguf_config, paired_gguf_sources, experts=False),
)
