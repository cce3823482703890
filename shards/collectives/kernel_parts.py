"""What the shared-memory kernel is made of: atomic words, addresses, and 16-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

F = TypeVar("F", bound=Callable[..., Any])

_WORD = ir.IntType(64)


def inlined(function: F) -> F:
    """Compiled into whatever calls it."""
    return cast(F, njit(function))


def _instruction(function: Callable[..., Any]) -> Any:
    """The arguments follow a first one, Numba's typing context, that the caller does not give."""
    return intrinsic(function)


def _implements(function: Callable[..., Any]) -> Callable[[F], F]:
    return cast("Callable[[F], F]", overload(function))


@_instruction
def load_acquire(_context: Any, _address: Any) -> Any:
    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@_instruction
def store_release(_context: Any, _address: Any, _value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_instruction
def copy(_context: Any, _target: Any, _source: Any, _size: Any) -> Any:
    """memcpy between addresses."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte_pointer = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(a, byte_pointer) for a in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@_instruction
def pointer(_context: Any, _address: Any) -> Any:
    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@_instruction
def bits_of(_context: Any, value: Any) -> Any:
    """A float32's bits."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_instruction
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 of these bits."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def widen(element: Any) -> Any:
    """To the type that sums are held in: bfloat16 comes as uint16 and float16 as int16 bits."""
    raise NotImplementedError("compiled only")


def narrow(total: Any, kind: Any) -> Any:
    """Back to the element type `kind`, rounded once, to nearest even."""
    raise NotImplementedError("compiled only")


@_implements(widen)
def _widen_for(element: Any) -> Any:
    if element == types.uint16:

        def bfloat16(element: Any) -> Any:
            return float_of(np.uint32(element) << np.uint32(16))

        return bfloat16

    if element == types.int16:

        def float16(element: Any) -> Any:
            bits = np.uint32(np.uint16(element))
            sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
            magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
            # The exponents' biases differ by 112; a product, unlike a sum, mends subnormals too.
            value = bits_of(float_of(magnitude) * np.float32(2.0**112))
            if magnitude >= np.uint32(0x0F800000):  # infinity and NaN keep the top exponent
                value = np.uint32(magnitude | np.uint32(0x7F800000))
            return float_of(value | sign)

        return float16

    def as_it_is(element: Any) -> Any:
        return element

    return as_it_is


@_implements(narrow)
def _narrow_for(total: Any, kind: Any) -> Any:
    if kind.dtype == types.uint16:

        def bfloat16(total: Any, kind: Any) -> Any:
            bits = bits_of(total)
            if total != total:
                return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return bfloat16

    if kind.dtype == types.int16:

        def float16(total: Any, kind: Any) -> Any:
            bits = bits_of(total)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            sign = np.uint32((bits ^ magnitude) >> np.uint32(16))
            if magnitude > np.uint32(0x7F800000):
                half = np.uint32(0x7E00)
            elif magnitude >= np.uint32(0x47800000):  # 2^16 and above is infinity
                half = np.uint32(0x7C00)
            elif magnitude < np.uint32(0x38800000):  # below 2^-14: subnormal
                # At 0.5 a float32 counts in steps of 2^-24, which are a subnormal half's: the
                # processor's own addition rounds.
                shifted = bits_of(float_of(magnitude) + np.float32(0.5))
                half = np.uint32(shifted - np.uint32(0x3F000000))
            else:
                odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
                rebiased = np.uint32(magnitude - np.uint32(112 << 23))
                half = np.uint32(np.uint32(rebiased + np.uint32(0xFFF) + odd) >> np.uint32(13))
            return np.int16(np.uint16(half | sign))

        return float16

    def as_it_is(total: Any, kind: Any) -> Any:
        return total

    return as_it_is
