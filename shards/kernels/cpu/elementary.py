"""Elementary functions of vectors that activations and attention are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit

from shards.kernels.cpu.emission import I32, LANES, constant, emits
from shards.kernels.cpu.simd import exp, floats, fma, splat

_ONE: Final = np.float32(1)
_TWO: Final = np.float32(2)
_HALF: Final = np.float32(0.5)
_SQRT_HALF: Final = np.float32(math.sqrt(0.5))
# ln(erfc(z) e^(z^2) (1 + z/2)) over t = 1 / (1 + z/2) for 0 <= z <= 10, to 5e-8: a form of
# Numerical Recipes' (6.2.3, "erfc" by Chebyshev), fitted anew. From t^9 down to t^0.
_ERFC: Final = tuple(
    np.float32(c)
    for c in (
        0.14493021317522453,
        -0.6808271749285013,
        1.1567337506879907,
        -0.6962518907107527,
        -0.08028043865988213,
        0.0012675896516465427,
        0.03460279894049623,
        0.3866404123607252,
        0.9986327833149167,
        -1.2654479969005816,
    )
)
# (tanh(x) - x) / x^3 over x^2 for |x| < 5/8: Cephes' tanhf, from x^8 down to x^0.
_TANH: Final = tuple(
    np.float32(c)
    for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1)
)
_TANH_LAST: Final = np.float32(-3.33332819422e-1)
_TANH_NEAR: Final = np.float32(0.625)


@emits(floats, floats)
def absolute(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """|x|."""
    integers = ir.VectorType(I32, LANES)
    bits = builder.bitcast(arguments[0], integers)
    return builder.bitcast(builder.and_(bits, constant(integers, 0x7FFFFFFF)), floats.ir)


@emits(floats, floats, floats, floats, floats)
def where_less(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """a < b ? c : d, lane by lane: (a, b, c, d)."""
    a, b, c, d = arguments
    return builder.select(builder.fcmp_ordered("<", a, b), c, d)


@njit
def tanh(x: Any) -> Any:
    """Within 3 ulp; a polynomial near 0, where 1 - e^(-2|x|) would cancel."""
    size = absolute(x)
    square = x * x
    near = splat(_TANH[0])
    for coefficient in _TANH[1:]:
        near = fma(near, square, splat(coefficient))
    near = fma(near, square, splat(_TANH_LAST))
    near = fma(near * square, x, x)
    fall = exp(splat(-_TWO) * size)
    far = (splat(_ONE) - fall) / (splat(_ONE) + fall)
    far = where_less(x, splat(np.float32(0)), splat(np.float32(0)) - far, far)
    return where_less(size, splat(_TANH_NEAR), near, far)


@njit
def sigmoid_times(x: Any, slope: Any) -> Any:
    """x / (1 + e^-slope)."""
    return x / (splat(_ONE) + exp(splat(np.float32(0)) - slope))


@njit
def normal_times(x: Any) -> Any:
    """x times the probability that a standard normal variable is at most x, by erfc(|x| / sqrt 2).

    To a few ulp of the result where x > 0; below, to 1e-7 of |x|.
    """
    z = absolute(x) * splat(_SQRT_HALF)
    t = splat(_ONE) / fma(z, splat(_HALF), splat(_ONE))
    power = splat(_ERFC[0])
    for coefficient in _ERFC[1:]:
        power = fma(power, t, splat(coefficient))
    tail = splat(_HALF) * t * exp(power - z * z)
    return x * where_less(x, splat(np.float32(0)), tail, splat(_ONE) - tail)
