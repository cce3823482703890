"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import gguf_scaling
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, ModelSpec

_DEFAULTS: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    plain = llama.llama_spec(config)
    layer = plain.layers[0]
    assert isinstance(layer.attention, Attention)
    layer = replace(
        layer,
        attention=replace(layer.attention, scale=fields.number("attention_multiplier")),
        residual_scale=fields.number("residual_multiplier"),
    )
    return replace(
        plain,
        architecture="granite",
        layers=(layer,) * len(plain.layers),
        embedding_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.number("logits_scaling"),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    optional = llama.GGUF_OPTIONAL | {
        "embedding_multiplier": "embedding_scale",
        "attention_multiplier": "attention.scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    config = gguf_fields(metadata, "granite", llama.GGUF_REQUIRED, optional)
    config["rope_scaling"] = gguf_scaling(metadata, "granite")
    return config


FAMILY = Family(
    name="Granite 3",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    spec=_spec,
    sources=lambda spec: sources(spec, llama.NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("granite", _gguf_config, llama.paired_gguf_sources),
)
