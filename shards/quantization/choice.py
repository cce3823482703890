"""Which weights of a model are kept quantised, and in what: arithmetic, known before loading.

"auto" keeps what the checkpoint means: a GGUF tensor in its own scheme, all else as floats; the
answers are those of the dequantised weights. "none" keeps floats. "int8" and "int4" hold for every
linear layer, whatever the checkpoint has, and leave those as they are that it already holds in so
many bits. Under "int4" the embedding and the output layer have 8 bits: at four, those of
SmolLM2-135M alone raise its perplexity by another eighth. All else is INT4: INT4_MINIMUM, a ninth
larger, was no better there (perplexity x 1.18 to 1.20 for both, quantised from Q4_1 with its inputs
shuffled, so that no group had a grid of its own).

A weight can be quantised if its inputs, on every rank, are whole blocks of 32; one that cannot is
kept as floats, on all ranks. A leaf: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shards.errors import UnsupportedModel
from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import ModelSpec
from shards.quantization.scheme import BLOCK, GGUF_SCHEMES, INT4, INT8, Scheme

Quantization = Literal["auto", "none", "int8", "int4"]

_LINEAR = {"int8": INT8, "int4": INT4}


@dataclass(frozen=True, slots=True)
class Choice:
    """`schemes` has the parameters that are kept quantised, by name. `widened` names those that
    were to be, but whose inputs are not cut into whole blocks on every rank."""

    schemes: Mapping[str, Scheme]
    widened: tuple[str, ...] = ()


def choose_schemes(
    spec: ModelSpec, layout: Layout, quantization: Quantization, stored: Mapping[str, str]
) -> Choice:
    """`stored` is the checkpoint's dtype of each parameter, by name; what it lacks is floats.

    Raises `UnsupportedModel` where "int8" or "int4" would leave every weight as it is.
    """
    schemes: dict[str, Scheme] = {}
    widened: list[str] = []
    for parameter in parameters(spec):
        scheme = _wanted(parameter, quantization, GGUF_SCHEMES.get(stored.get(parameter.name, "")))
        if scheme is None:
            continue
        if _in_whole_blocks(parameter, layout):
            schemes[parameter.name] = scheme
        else:
            widened.append(parameter.name)
    if widened and not schemes and quantization != "auto":
        raise UnsupportedModel(
            f"quantization={quantization}: no weight has inputs in whole blocks of {BLOCK} on each "
            f"of {layout.world} ranks (the model's width is {spec.width}): use quantization=none"
        )
    return Choice(schemes, tuple(widened))


def _wanted(
    parameter: Parameter, quantization: Quantization, stored: Scheme | None
) -> Scheme | None:
    if not parameter.is_linear:
        return None
    if quantization == "auto":
        return stored
    if quantization == "none":
        return None
    scheme = INT8 if parameter.cut is Cut.VOCABULARY else _LINEAR[quantization]
    return stored if stored is not None and stored.bits == scheme.bits else scheme


def _in_whole_blocks(parameter: Parameter, layout: Layout) -> bool:
    if parameter.axis == 0:
        return parameter.shape[1] % BLOCK == 0
    cuts = [layout.owned(parameter, rank) for rank in range(layout.world)]
    return all(cut.start % BLOCK == 0 and cut.stop % BLOCK == 0 for cut in cuts)
