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
_ABSENT_KV_HEADS = {**_DEFAULTS, "num_key_value_heads": 32}


def _windows(fields: Fields, longest: int) -> list[int | None]:
    """Each layer's window: those from `max_window_layers` on, or as `layer_types` says."""
    layers = fields.layers("num_hidden_layers")
    window = fields.window("sliding_window", longest)
    if not fields.flag("use_sliding_window") or window is None:
        return [None] * layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers")
        if type(first) is not int:
            raise UnsupportedModel(
                f"config field max_window_layers is {first!r}: a whole number is needed"
            )
        return [window if i >= first else None for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UnsupportedModel(
            f"config field layer_types is {kinds!r:.80}: one entry for each of the "
            f"num_hidden_layers={layers} is needed"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS if "num_key_value_heads" in config else _ABSENT_KV_HEADS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = (
        fields.integer("head_dim")
        if fields.get("head_dim") is not None
        else fields.even_share("hidden_size", "num_attention_heads")
    )
    longest = context(fields)
    windows = _windows(fields, longest)
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_act"),
        gated=True,
    )
    attention = Attention(heads, kv_heads, head_dim, scale=head_dim**-0.5, qkv_bias=True)
    kinds = {window: Layer(replace(attention, window=window), ffn) for window in set(windows)}
    return ModelSpec(
        architecture="qwen2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(kinds[window] for window in windows),
        norm=Norm("rms", fields.number("rms_norm_eps")),
        rotary=rotary(fields, head_dim),
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
