"""The least time that a decode step can take on a machine: the roofline.

A step takes at least the bytes it must move over the memory bandwidth, and at least its operations
over the rate of matrix products (Williams, Waterman and Patterson, "Roofline", CACM 2009). Nothing
is added for what software loses: a limit is not a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.blueprint import Blueprint
from shards.checkpoint.storage import choose_storage
from shards.cost.device import Arithmetic
from shards.cost.host import CoreRates, HostProfile
from shards.cost.precision import Precision
from shards.footprint import DTYPE_BYTES, rank_footprints
from shards.layout import make_layout
from shards.models.parameters import Parameter, parameters
from shards.models.spec import ModelSpec
from shards.quantization.choice import Quantization, choose_schemes
from shards.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Stored:
    """How a model's weights lie in memory: `schemes` has those that are quantised, by name, and
    `dtype` is that of all others, and of the KV cache."""

    dtype: str
    schemes: Mapping[str, Scheme]

    @classmethod
    def by(cls, spec: ModelSpec, dtype: str, quantization: Quantization) -> Stored:
        """Of a checkpoint of floats."""
        return cls(dtype, choose_schemes(spec, make_layout(spec, 1), quantization, {}).schemes)

    @classmethod
    def of(cls, blueprint: Blueprint) -> Stored:
        """Of an engine, whose checkpoint may be quantised already."""
        quantization = blueprint.config.quantization
        storage = choose_storage(blueprint.source, blueprint.layout, quantization)
        return cls(blueprint.dtype, storage.schemes)

    @property
    def precision(self) -> Precision:
        """The cost model's name for it: by the fewest bits that any weight has."""
        bits = min((scheme.bits for scheme in self.schemes.values()), default=None)
        return Precision(self.dtype, "none" if bits is None else "int4" if bits < 8 else "int8")

    def __str__(self) -> str:
        quantization = self.precision.quantization
        return self.dtype if quantization == "none" else f"{quantization}, {self.dtype} cache"

    def nbytes(self, parameter: Parameter) -> int:
        scheme = self.schemes.get(parameter.name)
        if scheme is None:
            return math.prod(parameter.shape) * DTYPE_BYTES[self.dtype]
        rows, inputs = parameter.shape
        return scheme.bytes_of(rows, inputs)

    def arithmetic(self, parameter: Parameter) -> Arithmetic:
        """What products with it are computed in, on a processor."""
        return "int8" if parameter.name in self.schemes else self.precision.activations


@dataclass(frozen=True, slots=True)
class Limit:
    """The least seconds of a step, by memory and by arithmetic; the larger one binds."""

    memory_s: float
    compute_s: float

    @property
    def step_s(self) -> float:
        return max(self.memory_s, self.compute_s)


def decode_limit(
    spec: ModelSpec, stored: Stored, rates: CoreRates, batch: int, context: int
) -> Limit:
    """Of a decode step of `batch` sequences with `context` tokens each: every weight and every
    sequence's keys and values are read once, every weight is multiplied with every row."""
    [footprint] = rank_footprints(spec, make_layout(spec, 1), stored.dtype, stored.schemes)
    nbytes = batch * context * footprint.kv_per_token
    compute_s = 0.0
    for p in parameters(spec):
        looked_up = p.name == "embedding.weight" and not spec.tied_embeddings
        if looked_up or p.name == "positions.weight":
            continue  # a step reads a row of it, not all
        nbytes += stored.nbytes(p)
        compute_s += 2 * batch * math.prod(p.shape) / rates.operations[stored.arithmetic(p)]
    return Limit(nbytes / rates.bandwidth, compute_s)


def rates_of(host: HostProfile, cores: int) -> CoreRates:
    """The measured rates of the largest number of cores up to `cores`."""
    return max((m for m in host.measured if m.cores <= cores), key=lambda m: m.cores)
