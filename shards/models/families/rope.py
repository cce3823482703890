"""Rotary positions as configs and GGUF files state them, shared by the families that have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields, positive
from shards.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

_KNOWN = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_DEFAULT_THETA = 10_000.0
_MOST_CONTEXT = 2**31 - 1

# What every Llama 3.1, 3.2 and 3.3 was trained with; a GGUF file states their effect alone.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def rotary(
    fields: Fields, head_dim: int, *, partial: bool = False, interleaved: bool = False
) -> Rotary:
    """Rotary embedding from `rope_parameters` (transformers 5) or from `rope_scaling` and
    `rope_theta` (before): over whole heads, or in a family with `partial` ones over as much of each
    as `partial_rotary_factor` says."""
    stated = _stated(fields)
    theta = stated.get("rope_theta") or fields.get("rope_theta") or _DEFAULT_THETA
    factor = stated.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if not partial and factor != 1.0:
        raise UnsupportedModel(
            f"config field partial_rotary_factor is {factor}: only 1.0 (whole heads) is known"
        )
    turned = head_dim * positive("partial_rotary_factor", factor)
    if not 2 <= turned < head_dim + 1:
        raise UnsupportedModel(
            f"config field partial_rotary_factor is {factor}: of head_dim {head_dim} that is "
            f"{turned:g} channels, from 2 to {head_dim} are needed"
        )
    dim = int(turned)
    if dim % 2:
        of = "" if dim == head_dim else f"partial_rotary_factor {factor} of "
        raise UnsupportedModel(
            f"{of}head_dim {head_dim} is odd: rotary positions turn channel pairs"
        )
    scaling = _scaling(fields, stated)
    if isinstance(scaling, LongRopeScaling):
        for name, divisors in (("short_factor", scaling.short), ("long_factor", scaling.long)):
            if len(divisors) != dim // 2:
                raise UnsupportedModel(
                    f"config field rope_scaling.{name} has {len(divisors)} numbers: "
                    f"{dim // 2} are needed, one for each pair of the {dim} rotated channels"
                )
    theta = positive("rope_theta", theta)
    if isinstance(scaling, YarnScaling) and theta == 1.0:
        raise UnsupportedModel(
            "config field rope_theta is 1: YaRN stretches frequencies that differ, for which "
            "another is needed"
        )
    return Rotary(theta, dim, interleaved, scaling)


def context(fields: Fields) -> int:
    """The longest sequence: `max_position_embeddings`, or what YaRN stretches the trained context
    to where that is longer (Qwen2.5's configs state the trained one)."""
    longest = fields.integer("max_position_embeddings")
    scaling = _scaling(fields, _stated(fields))
    if not isinstance(scaling, YarnScaling):
        return longest
    stretched = scaling.factor * scaling.original_context
    if stretched > _MOST_CONTEXT:
        raise UnsupportedModel(
            f"config field rope_scaling.factor is {scaling.factor:g}: of a trained context of "
            f"{scaling.original_context:,} that is more than the {_MOST_CONTEXT:,} supported"
        )
    return max(longest, int(stretched))


def score_factor(fields: Fields) -> float:
    """What DeepSeek multiplies attention scores by under YaRN: the temperature that
    `mscale_all_dim` takes out of cos and sin, squared; so the channels that are not rotated have it
    too."""
    stated = _stated(fields)
    scaling = _scaling(fields, stated)
    if not isinstance(scaling, YarnScaling) or not stated.get("mscale_all_dim"):
        return 1.0
    all_dim = positive("mscale_all_dim", stated["mscale_all_dim"])
    temperature = _temperature(scaling.factor, all_dim)
    return positive("mscale_all_dim", temperature * temperature)


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


def gguf_partial(metadata: Mapping[str, Any], architecture: str, head_dim: int) -> float:
    """The `partial_rotary_factor` of a Hugging Face config, from a GGUF file's metadata: whole
    heads where it does not say how many channels are rotated."""
    rotated = metadata.get(f"{architecture}.rope.dimension_count", head_dim)
    # Half a channel more: the factor's product with head_dim is cut to a whole number.
    return min(1.0, (rotated + 0.5) / head_dim)


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
    by_kind = [kind for kind, value in stated.items() if isinstance(value, Mapping)]
    if by_kind:
        raise UnsupportedModel(
            f"config field rope_parameters differs by layer ({', '.join(by_kind)}): in this family "
            "all layers rotate alike"
        )
    return stated


def _scaling(fields: Fields, stated: Mapping[str, Any]) -> Scaling | None:
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind == "su":
        kind = "longrope"  # its name in Phi-3's first configs
    if kind in ("default", "dynamic"):
        return None  # "dynamic" scales beyond max_position_embeddings alone, which is the context
    if kind not in _KNOWN:
        raise UnsupportedModel(
            f"config field rope_type is {kind!r}: known rope scalings are {', '.join(_KNOWN)}"
        )
    if kind == "linear":
        return LinearScaling(positive("rope_scaling.factor", stated.get("factor")))
    longest = fields.integer("max_position_embeddings")
    original = _original_context(fields, stated, longest)
    if kind == "llama3":
        low, high = (
            positive(name, stated.get(name)) for name in ("low_freq_factor", "high_freq_factor")
        )
        if low >= high:
            raise UnsupportedModel(
                f"config fields low_freq_factor={low:g} and high_freq_factor={high:g}: "
                "the latter must be the larger"
            )
        factor = positive("rope_scaling.factor", stated.get("factor"))
        return Llama3Scaling(factor, low, high, original)
    factor = positive("rope_scaling.factor", stated.get("factor") or longest / original)
    if kind == "longrope":
        return LongRopeScaling(
            short=_divisors(stated, "short_factor"),
            long=_divisors(stated, "long_factor"),
            original_context=original,
            attention_factor=_longrope_attention_factor(stated, factor, original),
        )
    return YarnScaling(
        factor=factor,
        original_context=original,
        attention_factor=_yarn_attention_factor(stated, factor),
        beta_fast=positive("beta_fast", stated.get("beta_fast") or 32),
        beta_slow=positive("beta_slow", stated.get("beta_slow") or 1),
        truncate=bool(stated.get("truncate", True)),
    )


def _original_context(fields: Fields, stated: Mapping[str, Any], longest: int) -> int:
    """The context that the model was trained with, before it was stretched."""
    name = "original_max_position_embeddings"
    found = fields.get(name) or stated.get(name) or longest
    # LongRoPE divides by its logarithm.
    if not 2 <= positive(name, found) <= _MOST_CONTEXT:
        raise UnsupportedModel(
            f"config field {name} is {found!r:.80}: from 2 to {_MOST_CONTEXT:,} is supported"
        )
    return int(found)


def _yarn_attention_factor(stated: Mapping[str, Any], factor: float) -> float:
    """The stated one, else equation 22 of arXiv:2309.00071, with DeepSeek's two multipliers."""
    if stated.get("attention_factor") is not None:
        return positive("attention_factor", stated["attention_factor"])
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        mscale = positive("mscale", stated["mscale"])
        all_dim = positive("mscale_all_dim", stated["mscale_all_dim"])
        return _temperature(factor, mscale) / _temperature(factor, all_dim)
    return _temperature(factor)


def _temperature(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _divisors(stated: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = stated.get(name)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UnsupportedModel(
            f"config field rope_scaling.{name} is {values!r:.80}: a list of numbers is needed"
        )
    return tuple(positive(f"rope_scaling.{name}[{i}]", value) for i, value in enumerate(values))


def _longrope_attention_factor(stated: Mapping[str, Any], factor: float, original: int) -> float:
    """The stated one, else arXiv:2402.13753's sqrt(1 + ln(factor) / ln(original context))."""
    if stated.get("attention_factor") is not None:
        return positive("attention_factor", stated["attention_factor"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
