"""What weights weigh and what is multiplied in, by dtype and quantisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from shards.cost.device import Arithmetic
from shards.cost.errors import CannotPredict
from shards.footprint import DTYPE_BYTES
from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import ModelSpec
from shards.quantization.choice import choose_schemes
from shards.quantization.scheme import BLOCK, Scheme

Quantization = Literal["auto", "none", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class _Packed:
    """`nbytes` of a weight, its part of the scales included; `stream_share` of the bandwidth that
    floats are read at, since unpacking takes the rest: fitted to gpt-fast's table."""

    nbytes: float
    stream_share: float


def _packed(scheme: Scheme) -> _Packed:
    return _Packed(scheme.bytes_of(1, BLOCK) / BLOCK, _STREAM_SHARES[scheme.bits])


# Six bits were not measured: as far from four as they are.
_STREAM_SHARES = {8: 0.82, 6: 0.72, 4: 0.63}
_FP8 = _Packed(1.0, 1.0)  # one scale per row: next to nothing


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` of hidden states, KV cache and whatever is not quantised; float32, bfloat16 or
    float16. `CannotPredict` for anything else.

    `stored` is the checkpoint's own dtype of each parameter, by name, as far as it is known
    (`shards.checkpoint.storage`): what "auto" keeps. `schemes` are what parameters are kept in once
    a layout is known: see `settled`.
    """

    dtype: str
    quantization: Quantization = "none"
    stored: Mapping[str, str] = field(default_factory=dict)
    schemes: Mapping[str, Scheme] | None = None

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

    def settled(self, spec: ModelSpec, layout: Layout) -> Precision:
        """With the schemes in which `spec`, cut by `layout`, is kept.

        Raises `UnsupportedModel` where none of its weights can be quantised.
        """
        if self.schemes is not None or self.quantization == "fp8":
            return self
        if self.quantization == "none":
            return replace(self, schemes={})
        chosen = choose_schemes(spec, layout, self.quantization, self.stored)
        return replace(self, schemes=chosen.schemes)

    def weight_bytes(self, parameter: Parameter) -> float:
        """Of one element of `parameter`; settled."""
        packed = self._packed(parameter)
        return self.value_bytes if packed is None else packed.nbytes

    def stream_share(self, parameter: Parameter) -> float:
        """The share of the bandwidth of floats at which products read `parameter`; settled."""
        packed = self._packed(parameter)
        return 1.0 if packed is None else packed.stream_share

    def arithmetic(self, parameter: Parameter, kind: Literal["cpu", "cuda"]) -> Arithmetic:
        """What products with `parameter` are computed in; settled.

        On CPUs weights that were asked for as integers meet activations that are quantised on the
        way (integer dot products); those that the checkpoint holds quantised are widened, as all
        are on GPUs. fp8 needs a device that has it.
        """
        if self._packed(parameter) is None:
            return self.activations
        if self.quantization == "fp8":
            return "fp8"
        return "int8" if kind == "cpu" and self.quantization != "auto" else self.activations

    def _packed(self, parameter: Parameter) -> _Packed | None:
        if self.quantization == "fp8":
            layers = parameter.is_linear and parameter.cut not in (Cut.REPLICATED, Cut.VOCABULARY)
            return _FP8 if layers else None
        assert self.schemes is not None, "not settled"
        scheme = self.schemes.get(parameter.name)
        return None if scheme is None else _packed(scheme)

    def rank_bytes(self, spec: ModelSpec, layout: Layout) -> tuple[int, ...]:
        """Bytes of the weights on each rank, tables that are only looked up included."""
        table, precision = parameters(spec), self.settled(spec, layout)
        return tuple(
            round(sum(held(p, layout, rank) * precision.weight_bytes(p) for p in table))
            for rank in range(layout.world)
        )

    def bits_per_weight(self, spec: ModelSpec, layout: Layout) -> float:
        """Of all parameters on average, scales included; each counted once."""
        precision = self.settled(spec, layout)
        sizes = [(math.prod(p.shape), precision.weight_bytes(p)) for p in parameters(spec)]
        return 8 * sum(n * each for n, each in sizes) / sum(n for n, _ in sizes)

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
