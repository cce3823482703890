"""From a family's table of names to a `Source` for every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.family import Source
from shards.models.parameters import parameters
from shards.models.spec import ModelSpec

Names = Mapping[str, str | Source]


def sources(spec: ModelSpec, names: Names) -> dict[str, Source]:
    """One `Source` per parameter of `spec`.

    `names` maps headwise's module names onto the checkpoint's, both without ".weight" and ".bias"
    and with `{i}` for the number of the layer and `{e}` for that of the expert; a bare string is a
    `Source` of that tensor alone. A parameter that is named with its suffix has a tensor whose name
    is given whole. A module that the spec has no parameter for may be named all the same.
    """
    found = {}
    for parameter in parameters(spec):
        i, e = parameter.layer, parameter.expert
        name = parameter.name.replace(f"layers.{i}.", "layers.{i}.")
        name = name.replace(f".experts.{e}.", ".experts.{e}.")
        module, _, suffix = name.rpartition(".")
        named, ending = (names[name], "") if name in names else (names[module], f".{suffix}")
        source = Source(named) if isinstance(named, str) else named
        found[parameter.name] = _filled(source, ending, i, e)
    return found


def _filled(source: Source, ending: str, layer: int | None, expert: int | None) -> Source:
    tensor, scales = (
        text.replace("{i}", str(layer)).replace("{e}", str(expert))
        for text in (source.tensor + ending, source.scales)
    )
    otherwise = source.otherwise and _filled(source.otherwise, ending, layer, expert)
    return replace(source, tensor=tensor, scales=scales, otherwise=otherwise)


def gguf_fields(
    metadata: Mapping[str, Any],
    architecture: str,
    required: Mapping[str, str],
    optional: Mapping[str, str],
) -> dict[str, Any]:
    """Config fields from GGUF metadata; both tables map a config field onto a key of the file.

    A key that lists a value per layer must list equal ones. Raises `UnsupportedModel`, naming the
    key, where that is not so or a required key is missing.
    """
    config = {}
    for field, key in {**required, **optional}.items():
        key = f"{architecture}.{key}"
        value = metadata.get(key)
        if value is None and field in required:
            raise UnsupportedModel(f"GGUF metadata has no {key}: convert the model again")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(
                    f"GGUF metadata {key} differs from layer to layer: equal layers are needed"
                )
            value = value[0]
        if value is not None:
            config[field] = value
    return config
