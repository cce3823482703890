"""The attention pattern that the config of any family may name, in a field of headwise's own.

`"headwise_mask": "prefix"` in a config.json makes a prefix decoder of the model: its prompt is read
in both directions, as GLM and T5's prefix language model read theirs (arXiv:1910.10683, section
3.2), and what it generates in one. "causal", the default, is every decoder's usual pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from shards.errors import UnsupportedModel
from shards.models.spec import Attention, Layer, Mask, ModelSpec

FIELD = "headwise_mask"


def masked(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    """`spec` with the mask that `config` names in every layer.

    Raises `UnsupportedModel` for an unknown one, and for "prefix" where a layer has a sliding
    window or latent attention.
    """
    mask = config.get(FIELD) or "causal"
    if mask not in get_args(Mask):
        raise UnsupportedModel(
            f"config field {FIELD} is {mask!r}: known are {', '.join(get_args(Mask))}"
        )
    if mask == "causal":
        return spec
    layers = {layer: _prefixed(layer) for layer in set(spec.layers)}
    return replace(spec, layers=tuple(layers[layer] for layer in spec.layers))


def reads_whole_prompts(spec: ModelSpec) -> bool:
    """Whether a prompt's positions see later ones, so that none is computed before all are known:
    prompts are then computed in one step, and what two have in common is not shared."""
    return any(
        isinstance(layer.attention, Attention) and layer.attention.mask == "prefix"
        for layer in spec.layers
    )


def _prefixed(layer: Layer) -> Layer:
    attention = layer.attention
    if not isinstance(attention, Attention):
        raise UnsupportedModel(
            f"config field {FIELD} is 'prefix' in a model with latent attention, which is causal: "
            "remove the field"
        )
    if attention.window is not None:
        raise UnsupportedModel(
            f"config field {FIELD} is 'prefix' in a model with a sliding window of "
            f"{attention.window}: whether the window or the prefix bounds what a position of the "
            "prompt sees is not defined; remove one of the two"
        )
    return replace(layer, attention=replace(attention, mask="prefix"))
