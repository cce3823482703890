"""What weights weigh and what is multiplied in, by dtype and quantisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from shards.cost.device import Arithmetic
from shards.cost.errors import CannotPredict
from shards.footprint import DTYPE_BYTES
from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import ModelSpec
from shards.quantization.scheme import BLOCK, INT4, INT8, Scheme

Quantization = Literal["none", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class _Packed:
    """`nbytes` of a weight, its part of the scales included; `stream_share` of the bandwidth that
    floats are read at, since unpacking takes the rest: fitted to gpt-fast's table."""

    nbytes: float
    stream_share: float


def _packed(scheme: Scheme, stream_share: float) -> _Packed:
    return _Packed(scheme.bytes_of(1, BLOCK) / BLOCK, stream_share)


_INT8 = _packed(INT8, 0.82)
_LAYERS: Mapping[Quantization, _Packed] = {
    "int8": _INT8,
    "int4": _packed(INT4, 0.63),
    "fp8": _Packed(1.0, 1.0),  # one scale per row: next to nothing
}
# The embedding and the output layer, which four bits would hurt.
_VOCABULARY: Mapping[Quantization, _Packed] = {"int8": _INT8, "int4": _INT8}


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` of hidden states, KV cache and whatever is not quantised; float32, bfloat16 or
    float16. `CannotPredict` for anything else."""

    dtype: str
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise CannotPredict(f"dtype {self.dtype}: use one of {', '.join(DTYPE_BYTES)}")
        if self.quantization not in get_args(Quantization):
            raise CannotPredict(
                f"quantization {self.quantization}: use one of {', '.join(get_args(Quantization))}"
            )

    @property
    def value_bytes(self) -> int:
        """Of a hidden state's or the KV cache's values."""
        return DTYPE_BYTES[self.dtype]

    def weight_bytes(self, parameter: Parameter) -> float:
        """Of one element of `parameter`: vectors and position tables are never quantised."""
        packed = self._packed(parameter)
        return self.value_bytes if packed is None else packed.nbytes

    def stream_share(self, parameter: Parameter) -> float:
        """The share of the bandwidth of floats at which products read `parameter`."""
        packed = self._packed(parameter)
        return 1.0 if packed is None else packed.stream_share

    def arithmetic(self, parameter: Parameter, kind: Literal["cpu", "cuda"]) -> Arithmetic:
        """What products with `parameter` are computed in.

        On CPUs integer weights meet activations that are quantised on the way (integer dot
        products); on GPUs they are widened in registers. fp8 needs a device that has it.
        """
        if self._packed(parameter) is None:
            return self.activations
        if self.quantization == "fp8":
            return "fp8"
        return "int8" if kind == "cpu" else self.activations

    def _packed(self, parameter: Parameter) -> _Packed | None:
        if len(parameter.shape) != 2 or parameter.cut is Cut.REPLICATED:
            return None
        table = _VOCABULARY if parameter.cut is Cut.VOCABULARY else _LAYERS
        return table.get(self.quantization)

    def rank_bytes(self, spec: ModelSpec, layout: Layout) -> tuple[int, ...]:
        """Bytes of the weights on each rank, tables that are only looked up included."""
        table = parameters(spec)
        return tuple(
            round(sum(held(p, layout, rank) * self.weight_bytes(p) for p in table))
            for rank in range(layout.world)
        )

    @property
    def activations(self) -> Arithmetic:
        """What attention is computed in."""
        return _ACTIVATIONS[self.dtype]


def held(parameter: Parameter, layout: Layout, rank: int) -> int:
    """Elements of `parameter` that lie on `rank`."""
    owned = len(layout.owned(parameter, rank))
    return owned * (math.prod(parameter.shape) // parameter.shape[parameter.axis])


_ACTIVATIONS: Mapping[str, Arithmetic] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
