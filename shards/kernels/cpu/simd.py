"""Vectors for Numba: float32 lanes of the host's own width, as values of compiled functions.

Every function here is used inside compiled code alone. Nothing is reassociated: what a kernel
writes is what is computed, in that order, so that results do not depend on the vectors' width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import lower_builtin, models, register_model, type_callable

from shards.kernels.cpu.emission import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call_llvm,
    constant,
    emits,
    load_ir,
    narrow_ir,
    splat_ir,
    store_ir,
    suffix,
    widen_ir,
)


class Vector(types.Type):  # type: ignore[misc]
    """`lanes` elements of an LLVM type, held in a register."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.ir = ir.VectorType(element, lanes)
        super().__init__(name=f"Vector({lanes} x {element})")


floats = Vector(F32, LANES)
integers = Vector(I32, LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)


address = types.int64


@emits(floats, address)
def load(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """LANES float32."""
    return load_ir(builder, arguments[0], floats.ir)


@emits(types.void, address, floats)
def store(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
    """LANES float32 at an address."""
    store_ir(builder, arguments[1], arguments[0])


_BITS = ir.VectorType(I16, LANES)


@emits(floats, address)
def load_bfloat16(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    return widen_ir(builder, load_ir(builder, arguments[0], _BITS), "bfloat16")


@emits(floats, address)
def load_float16(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    return widen_ir(builder, load_ir(builder, arguments[0], _BITS), "float16")


@emits(types.void, address, floats)
def store_bfloat16(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
    store_ir(builder, narrow_ir(builder, arguments[1], "bfloat16"), arguments[0])


@emits(types.void, address, floats)
def store_float16(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
    store_ir(builder, narrow_ir(builder, arguments[1], "float16"), arguments[0])


def _mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    lanes = ir.Constant(integers.ir, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat_ir(builder, builder.trunc(count, I32), LANES))


@emits(floats, address, types.int64)
def load_part(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """The first `count` float32, 0 in the other lanes; nothing behind them is touched."""
    pointer = builder.inttoptr(arguments[0], floats.ir.as_pointer())
    mask = _mask(builder, arguments[1])
    zero = constant(floats.ir, 0.0)
    name = f"llvm.masked.load.{suffix(floats.ir)}.p0"
    return call_llvm(builder, name, floats.ir, [pointer, I32(1), mask, zero])


@emits(types.void, address, floats, types.int64)
def store_part(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
    """The first `count` lanes; nothing behind them is touched."""
    pointer = builder.inttoptr(arguments[0], floats.ir.as_pointer())
    mask = _mask(builder, arguments[2])
    name = f"llvm.masked.store.{suffix(floats.ir)}.p0"
    call_llvm(builder, name, ir.VoidType(), [arguments[1], pointer, I32(1), mask])


@emits(floats, types.float32)
def splat(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    return splat_ir(builder, arguments[0], LANES)


@emits(floats, floats, floats, floats)
def fma(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """a * b + c, rounded once."""
    return call_llvm(builder, f"llvm.fma.{suffix(floats.ir)}", floats.ir, arguments)


@emits(types.float32, types.float32, types.float32, types.float32)
def fma_scalar(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """a * b + c, rounded once: the same bits as a lane of `fma`."""
    return call_llvm(builder, "llvm.fma.f32", F32, arguments)


@emits(floats, floats, floats)
def maximum(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """The larger of each lane; of a NaN and a number, the second."""
    a, b = arguments
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@emits(types.float32, floats)
def sum_lanes(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """All lanes in pairs: halves are added until one is left, whatever the width."""
    return _fold(builder, arguments[0], builder.fadd)


@emits(types.float32, floats)
def max_lanes(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    def larger(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return _fold(builder, arguments[0], larger)


def _fold(
    builder: ir.IRBuilder, value: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    while value.type.count > 1:
        half = value.type.count // 2
        low, high = (
            builder.shuffle_vector(
                value,
                ir.Constant(value.type, ir.Undefined),
                ir.Constant(ir.VectorType(I32, half), list(range(start, start + half))),
            )
            for start in (0, half)
        )
        value = join(low, high)
    return builder.extract_element(value, I32(0))


@emits(floats, floats)
def exp(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
    """e^x within 2 ulp; 0 below -87.3, infinity above 88.7, NaN of NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2, e^r by the polynomial of Cephes' expf.
    """
    (x,) = arguments
    kind = x.type

    def c(value: float) -> ir.Constant:
        return constant(kind, value)

    def f(a: ir.Value, b: ir.Value, d: ir.Value) -> ir.Value:
        return call_llvm(builder, f"llvm.fma.{suffix(kind)}", kind, [a, b, d])

    too_low = builder.fcmp_ordered("<", x, c(-87.33654))
    too_high = builder.fcmp_ordered(">", x, c(88.72283))
    bounded = builder.select(too_low, c(0.0), builder.select(too_high, c(0.0), x))
    name = f"llvm.rint.{suffix(kind)}"
    n = call_llvm(builder, name, kind, [builder.fmul(bounded, c(1.44269504))])
    r = f(n, c(-0.693359375), bounded)
    r = f(n, c(2.12194440e-4), r)
    p = c(1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = f(p, r, c(coefficient))
    e_r = builder.fadd(f(p, builder.fmul(r, r), r), c(1.0))
    # 2^n in two factors, since n = 128 has no float32 of its own.
    whole = builder.fptosi(n, ir.VectorType(I32, kind.count))
    half = builder.ashr(whole, constant(whole.type, 1))
    result = e_r
    for part in (half, builder.sub(whole, half)):
        biased = builder.add(part, constant(whole.type, 127))
        power = builder.bitcast(builder.shl(biased, constant(whole.type, 23)), kind)
        result = builder.fmul(result, power)
    result = builder.select(too_low, c(0.0), result)
    result = builder.select(too_high, c(float("inf")), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


def _operator(function: Callable[..., Any], method: str) -> None:
    @type_callable(function)
    def _typed(_context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            return floats if a == floats and b == floats else None

        return typer

    @lower_builtin(function, floats, floats)
    def _lowered(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return getattr(builder, method)(*arguments)


for _function, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
    (operator.iadd, "fadd"),
    (operator.isub, "fsub"),
    (operator.imul, "fmul"),
):
    _operator(_function, _method)


def _scalar(element: ir.Type, result: types.Type, name: str) -> tuple[Any, Any]:
    @emits(result, address)
    def load_one(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
        return load_ir(builder, arguments[0], element)

    @emits(types.void, address, result)
    def store_one(builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        store_ir(builder, arguments[1], arguments[0])

    return load_one, store_one


load_f32, store_f32 = _scalar(F32, types.float32, "f32")
load_i64, store_i64 = _scalar(I64, types.int64, "i64")
load_i32, store_i32 = _scalar(I32, types.int32, "i32")
load_i8, store_i8 = _scalar(I8, types.int8, "i8")
load_u8, store_u8 = _scalar(I8, types.uint8, "u8")
