"""GPT-BigCode: SantaCoder and StarCoder. GPT-2 with plain linear layers and one shared KV head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families.fields import Fields
from shards.models.families.gpt2 import ALIASES, NO_CROSS_ATTENTION, ffn_width
from shards.models.families.names import sources
from shards.models.family import Family, Source
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
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "multi_query": True,
    "tie_word_embeddings": True,
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, ALIASES)
    fields.refuse_flag("add_cross_attention", NO_CROSS_ATTENTION)
    heads, head_dim = fields.heads("n_head"), fields.even_share("n_embd", "n_head")
    layer = Layer(
        Attention(
            heads=heads,
            kv_heads=1 if fields.flag("multi_query") else heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if fields.flag("scale_attn_weights") else 1.0,
            qkv_bias=True,
            out_bias=True,
        ),
        FeedForward(ffn_width(fields), fields.activation("activation_function"), False, bias=True),
    )
    positions = fields.integer("n_positions")
    return ModelSpec(
        architecture="gpt_bigcode",
        width=fields.integer("n_embd"),
        vocabulary=fields.integer("vocab_size"),
        context=positions,
        layers=(layer,) * fields.layers("n_layer"),
        norm=Norm("layer", fields.number("layer_norm_epsilon"), bias=True),
        positions=LearnedPositions(positions),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _sources(spec: ModelSpec) -> dict[str, Source]:
    """c_attn is all of q, then the one k and v; without multi-query it is q, k, v head by head."""
    attention = spec.layers[0].attention
    fused, head_dim = "transformer.h.{i}.attn.c_attn", attention.head_dim
    if attention.kv_heads == 1:
        parts = [Source(fused, offset=at) for at in (0, spec.width, spec.width + head_dim)]
    else:
        parts = [
            Source(fused, offset=nth * head_dim, block=head_dim, stride=3 * head_dim)
            for nth in range(3)
        ]
    names: dict[str, str | Source] = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "layers.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
        "layers.{i}.ffn_norm": "transformer.h.{i}.ln_2",
        "layers.{i}.ffn.up": "transformer.h.{i}.mlp.c_fc",
        "layers.{i}.ffn.down": "transformer.h.{i}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    }
    for part, source in zip("qkv", parts, strict=True):
        names[f"layers.{{i}}.attention.{part}"] = source
    return sources(spec, names)


FAMILY = Family(
    name="GPT-BigCode",
    architectures=("GPTBigCodeForCausalLM",),
    model_type="gpt_bigcode",
    spec=_spec,
    sources=_sources,
    prefix="transformer.",
    # The causal mask, which old checkpoints save, and a tied second copy of the embedding.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)
