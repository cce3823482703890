"""The families that headwise knows, and how a model finds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import (
    bloom,
    cohere,
    cohere2,
    deepseek,
    falcon,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    stablelm,
    starcoder2,
)
from shards.models.family import Family, GGUFNames

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma3.MULTIMODAL,
    phi3.FAMILY,
    glm.FAMILY,
    glm4.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
    cohere.FAMILY,
    cohere2.FAMILY,
    starcoder2.FAMILY,
    gpt2.FAMILY,
    gpt_bigcode.FAMILY,
    falcon.FAMILY,
    gpt_neox.FAMILY,
    gptj.FAMILY,
    opt.FAMILY,
    bloom.FAMILY,
    stablelm.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    gpt_oss.FAMILY,
    deepseek.V2,
    deepseek.V3,
)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """By the config's `architectures`, or by `model_type` where it lists none.

    Raises `UnsupportedModel` naming the known ones and the nearest.
    """
    architectures = config.get("architectures")
    if architectures:
        names = architectures if isinstance(architectures, list) else [architectures]
        for family in FAMILIES:
            if any(name in family.architectures for name in names):
                return family
        known = [name for family in FAMILIES for name in family.architectures]
        raise _unknown("architecture", str(names[0]), known, _remarks(config))
    model_type = config.get("model_type")
    if model_type is None:
        raise UnsupportedModel(
            "the config states neither architectures nor model_type: add one of "
            + ", ".join(family.model_type for family in FAMILIES)
        )
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = [family.model_type for family in FAMILIES]
    raise _unknown("model_type", str(model_type), known, _remarks(config))


def family_of_gguf(architecture: str, *, experts: bool = False) -> tuple[Family, GGUFNames]:
    """By a GGUF file's `general.architecture`, and whether it has experts: the family and its
    `gguf`.

    Raises `UnsupportedModel` naming the known ones and the nearest.
    """
    known = [(family, family.gguf) for family in FAMILIES if family.gguf is not None]
    for family, names in known:
        if names.architecture == architecture and names.experts in (None, experts):
            return family, names
    architectures = list(dict.fromkeys(names.architecture for _, names in known))
    raise _unknown("GGUF architecture", architecture, architectures)


def _unknown(kind: str, name: str, known: Sequence[str], remarks: str = "") -> UnsupportedModel:
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)
    return UnsupportedModel(
        f"{kind} {name!r} is unknown: known are {', '.join(known)}; the nearest is {nearest[0]}"
        + remarks
    )


def _remarks(config: Mapping[str, Any]) -> str:
    """What else a config of an unknown model says that leads its reader on."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type"):
        return (
            f"; it holds a text model of model_type {text['model_type']!r}, which has to be saved "
            "by itself to be served"
        )
    if config.get("auto_map"):
        return "; its auto_map names code that comes with the model, and such code is never run"
    return ""
