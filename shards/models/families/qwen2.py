"""Qwen2 and Qwen2.5: Llama's modules and names, with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# An absent field means 32, a null one as many as query heads.
_ABSENT = {"num_key_value_heads": 32}


def windows(fields: Fields, longest: int) -> list[int | None]:
    """Each layer's window: those from `max_window_layers` on, or as `layer_types` says."""
    window = fields.window("sliding_window", longest)
    if not fields.flag("use_sliding_window") or window is None:
        return [None] * fields.layers("num_hidden_layers")
    first = fields.get("max_window_layers")
    if type(first) is not int:
        raise UnsupportedModel(
            f"config field max_window_layers is {first!r}: a whole number is needed"
        )
    return [window if sliding else None for sliding in fields.sliding_layers(lambda i: i >= first)]


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS, absent=_ABSENT)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    longest = context(fields)
    per_layer = windows(fields, longest)
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_act"),
        gated=True,
    )
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=True,
        rotary=rotary(fields, head_dim),
    )
    kinds = {window: Layer(replace(attention, window=window), ffn) for window in set(per_layer)}
    return ModelSpec(
        architecture="qwen2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(kinds[window] for window in per_layer),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    config = gguf_fields(metadata, "qwen2", llama.GGUF_REQUIRED, llama.GGUF_OPTIONAL)
    # The file's absent count means "as many as query heads", not a config's default.
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["rope_scaling"] = gguf_scaling(metadata, "qwen2")
    return config


FAMILY = Family(
    name="Qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    spec=_spec,
    sources=lambda spec: sources(spec, llama.NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("qwen2", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
