"""Qwen2 and Qwen2.5: Llama's modules and names, with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
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


def _refuse_sliding_window(fields: Fields, longest: int) -> None:
    """Layers from `max_window_layers` on may see a window only; a window that holds the whole
    context changes nothing."""
    if not fields.flag("use_sliding_window") or fields.integer("sliding_window") >= longest:
        return
    kinds, first = fields.get("layer_types"), fields.get("max_window_layers")
    if kinds is None and isinstance(first, int) and first >= fields.integer("num_hidden_layers"):
        return
    if kinds is None or "sliding_attention" in kinds:
        raise UnsupportedModel(
            f"config field use_sliding_window is true with a window of "
            f"{fields.get('sliding_window')} below the context of {longest}: only full attention "
            "is known; lower max_position_embeddings to the window or set it to false"
        )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS if "num_key_value_heads" in config else _ABSENT_KV_HEADS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = (
        fields.integer("head_dim")
        if fields.get("head_dim") is not None
        else fields.even_share("hidden_size", "num_attention_heads")
    )
    longest = context(fields)
    _refuse_sliding_window(fields, longest)
    layer = Layer(
        Attention(heads, kv_heads, head_dim, scale=head_dim**-0.5, qkv_bias=True),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=True,
        ),
    )
    return ModelSpec(
        architecture="qwen2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=(layer,) * fields.integer("num_hidden_layers"),
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
