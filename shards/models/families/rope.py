"""Rotary positions as configs and GGUF files state them, shared by the families that have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields, positive
from shards.models.spec import LinearScaling, Llama3Scaling, Rotary, Scaling, YarnScaling

_KNOWN = ("default", "linear", "llama3", "yarn")
_DEFAULT_THETA = 10_000.0

# What every Llama 3.1, 3.2 and 3.3 was trained with; a GGUF file states their effect alone.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def rotary(fields: Fields, head_dim: int) -> Rotary:
    """Rotary embedding over whole heads, from `rope_parameters` (transformers 5) or from
    `rope_scaling` and `rope_theta` (before)."""
    stated = _stated(fields)
    theta = stated.get("rope_theta") or fields.get("rope_theta") or _DEFAULT_THETA
    partial = stated.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModel(
            f"config field partial_rotary_factor is {partial}: only 1.0 (whole heads) is known"
        )
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim {head_dim} is odd: rotary positions turn channel pairs")
    return Rotary(positive("rope_theta", theta), head_dim, scaling=_scaling(fields, stated))


def context(fields: Fields) -> int:
    """The longest sequence: `max_position_embeddings`, or what YaRN stretches the trained context
    to where that is longer (Qwen2.5's configs state the trained one)."""
    longest = fields.integer("max_position_embeddings")
    scaling = _scaling(fields, _stated(fields))
    if isinstance(scaling, YarnScaling):
        return max(longest, int(scaling.factor * scaling.original_context))
    return longest


def gguf_scaling(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    """The `rope_scaling` of a Hugging Face config, from a GGUF file's metadata."""
    key = f"{architecture}.rope.scaling"
    legacy = metadata.get(f"{architecture}.rope.scale_linear", 1.0)
    kind = metadata.get(f"{key}.type", "none" if legacy == 1.0 else "linear")
    if kind == "none":
        return None
    temperature = metadata.get(f"{key}.attn_factor", 1.0)
    if temperature != 1.0:
        raise UnsupportedModel(
            f"GGUF metadata {key}.attn_factor is {temperature!r}: only 1 is known; use the "
            "safetensors checkpoint, whose config states the attention factor"
        )
    scaling = {
        "rope_type": kind,
        "factor": metadata.get(f"{key}.factor", legacy),
        "original_max_position_embeddings": metadata.get(f"{key}.original_context_length"),
        "beta_fast": metadata.get(f"{key}.yarn_beta_fast"),
        "beta_slow": metadata.get(f"{key}.yarn_beta_slow"),
    }
    return {name: value for name, value in scaling.items() if value is not None}


def llama3_scaling_of(divisors: Sequence[float], theta: float) -> dict[str, Any]:
    """The `rope_scaling` behind GGUF's `rope_freqs.weight`: the number by which each of the
    head_dim / 2 frequencies is divided.

    The file does not state the four numbers that made them, so the known ones are tried and the
    divisors compared; raises `UnsupportedModel` where they differ by more than 0.1%.
    """
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise UnsupportedModel("tensor rope_freqs.weight holds values that divide no frequency")
    # The lowest frequency is divided by the factor itself; the digits are those of float32.
    scaling = Llama3Scaling(round(max(divisors), 4), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    for i, divisor in enumerate(divisors):
        wavelength = 2 * math.pi * theta ** (i / len(divisors))
        if not math.isclose(divisor, _llama3_divisor(scaling, wavelength), rel_tol=1e-3):
            raise UnsupportedModel(
                f"tensor rope_freqs.weight scales frequency {i} by 1/{divisor:g}, which is not "
                "Llama 3's rope scaling: use the safetensors checkpoint, whose config states it"
            )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _llama3_divisor(scaling: Llama3Scaling, wavelength: float) -> float:
    turns = scaling.original_context / wavelength
    if turns > scaling.high_freq_factor:
        return 1.0
    if turns < scaling.low_freq_factor:
        return scaling.factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (turns - scaling.low_freq_factor) / span
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def _stated(fields: Fields) -> Mapping[str, Any]:
    stated = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise UnsupportedModel(f"config field rope_scaling is {stated!r}: an object is needed")
    return stated


def _scaling(fields: Fields, stated: Mapping[str, Any]) -> Scaling | None:
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind == "default":
        return None
    if kind not in _KNOWN:
        raise UnsupportedModel(
            f"config field rope_type is {kind!r}: known rope scalings are {', '.join(_KNOWN)}"
        )
    if kind == "linear":
        return LinearScaling(positive("rope_scaling.factor", stated.get("factor")))
    longest = fields.integer("max_position_embeddings")
    original = int(
        positive(
            "original_max_position_embeddings",
            fields.get("original_max_position_embeddings")
            or stated.get("original_max_position_embeddings")
            or longest,
        )
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=positive("rope_scaling.factor", stated.get("factor")),
            low_freq_factor=positive("low_freq_factor", stated.get("low_freq_factor")),
            high_freq_factor=positive("high_freq_factor", stated.get("high_freq_factor")),
            original_context=original,
        )
    factor = positive("rope_scaling.factor", stated.get("factor") or longest / original)
    return YarnScaling(
        factor=factor,
        original_context=original,
        attention_factor=_yarn_attention_factor(stated, factor),
        beta_fast=positive("beta_fast", stated.get("beta_fast") or 32),
        beta_slow=positive("beta_slow", stated.get("beta_slow") or 1),
        truncate=bool(stated.get("truncate", True)),
    )


def _yarn_attention_factor(stated: Mapping[str, Any], factor: float) -> float:
    """The stated one, else equation 22 of arXiv:2309.00071, with DeepSeek's two multipliers."""
    if stated.get("attention_factor") is not None:
        return positive("attention_factor", stated["attention_factor"])

    def temperature(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if stated.get("mscale") and stated.get("mscale_all_dim"):
        all_dim = positive("mscale_all_dim", stated["mscale_all_dim"])
        return temperature(positive("mscale", stated["mscale"])) / temperature(all_dim)
    return temperature(1.0)
