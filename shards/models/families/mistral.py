"""Mistral 7B and what follows it: Llama's modules and names, and a window over the attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import sources
from shards.models.families.rope import context, rotary
from shards.models.family import Family
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# An absent field is the default, a null one means as many KV heads as query heads, or no window.
_ABSENT = {"num_key_value_heads": 8, "sliding_window": 4096}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, absent=_ABSENT)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            window=fields.window("sliding_window", longest),
            rotary=rotary(fields, head_dim),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
    )
    return ModelSpec(
        architecture="mistral",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


FAMILY = Family(
    name="Mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    spec=_spec,
    sources=lambda spec: sources(spec, llama.NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
)
