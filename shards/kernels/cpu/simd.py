"""Vectors for Numba: float32 lanes of the host's own width, as values of compiled functions.

Every function here is used inside compiled code alone. Addresses are int64. A vector has `LANES`
float32; 16-bit numbers are widened as they are loaded and rounded to nearest even as they are
stored. Nothing is reassociated: what a kernel writes is what is computed, in that order, so that
results do not depend on the vectors' width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# What LLVM compiles for: NUMBA_CPU_FEATURES and NUMBA_CPU_NAME change it, as everywhere in Numba.


def _features() -> frozenset[str]:
    from numba.core import config

    given = config.CPU_FEATURES
    if given is None and config.CPU_NAME in (None, "host"):
        given = llvm.get_host_cpu_features().flatten()
    return frozenset(name[1:] for name in (given or "").split(",") if name.startswith("+"))


FEATURES = _features()
LANES = 16 if "avx512f" in FEATURES else 8 if "avx2" in FEATURES else 4
REGISTERS = 32 if LANES == 16 or "neon" in FEATURES else 16
BYTES = 4 * LANES


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


def call_llvm(
    builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]
) -> ir.Value:
    """Call an LLVM intrinsic by its full name, "llvm.fma.v8f32" say."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)


def suffix(vector: ir.VectorType) -> str:
    """How LLVM's intrinsics name a vector type: "v8f32"."""
    element = {F16: "f16", F32: "f32"}.get(vector.element) or f"i{vector.element.width}"
    return f"v{vector.count}{element}"


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def splat_ir(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane."""
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    mask = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def load_ir(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """`kind` from an address (int64), which need not be aligned."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store_ir(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def widen_ir(builder: ir.IRBuilder, value: ir.Value, kind: str) -> ir.Value:
    """Vector of float32, or of the bits (int16) of bfloat16 or float16 -> vector of float32."""
    wide = ir.VectorType(F32, value.type.count)
    if kind == "bfloat16":
        bits = builder.zext(value, ir.VectorType(I32, value.type.count))
        return builder.bitcast(builder.shl(bits, constant(bits.type, 16)), wide)
    if kind == "float16":
        if _HALVES:
            return builder.fpext(builder.bitcast(value, ir.VectorType(F16, value.type.count)), wide)
        return _widen_half(builder, value)
    return value


# Where the processor does not convert float16, LLVM calls functions that a process need not have.
_HALVES = bool({"f16c", "avx512f", "neon"} & FEATURES)


def _widen_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Bits of float16 -> float32: the exponent is moved by a product, subnormals included."""
    wide = ir.VectorType(F32, value.type.count)
    bits = builder.zext(value, ir.VectorType(I32, value.type.count))
    magnitude = builder.and_(bits, constant(bits.type, 0x7FFF))
    magnitude = builder.shl(magnitude, constant(bits.type, 13))
    sign = builder.shl(builder.and_(bits, constant(bits.type, 0x8000)), constant(bits.type, 16))
    scaled = builder.fmul(builder.bitcast(magnitude, wide), constant(wide, 2.0**112))
    special = builder.or_(magnitude, constant(bits.type, 0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, constant(bits.type, 0x7C00 << 13))
    found = builder.select(is_special, special, builder.bitcast(scaled, bits.type))
    return builder.bitcast(builder.or_(found, sign), wide)


def _narrow_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 -> bits of float16, to nearest even."""
    kind = ir.VectorType(I32, value.type.count)

    def c(number: int) -> ir.Constant:
        return constant(kind, number)

    bits = builder.bitcast(value, kind)
    sign = builder.lshr(builder.and_(bits, c(0x80000000)), c(16))
    size = builder.and_(bits, c(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, c(13)), c(1))
    rebased = builder.sub(builder.add(size, builder.add(odd, c(0xFFF))), c(112 << 23))
    normal = builder.lshr(rebased, c(13))
    # Adding 0.5 leaves a subnormal's bits, rounded, in the last places.
    shifted = builder.fadd(builder.bitcast(size, value.type), constant(value.type, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, kind), c(0x3F000000))
    is_nan = builder.icmp_unsigned(">", size, c(0x7F800000))
    special = builder.select(is_nan, c(0x7E00), c(0x7C00))
    found = builder.select(builder.icmp_unsigned("<", size, c(0x38800000)), subnormal, normal)
    is_special = builder.icmp_unsigned(">=", size, c(0x47800000))
    found = builder.select(is_special, special, found)
    return builder.trunc(builder.or_(found, sign), ir.VectorType(I16, value.type.count))


def narrow_ir(builder: ir.IRBuilder, value: ir.Value, kind: str) -> ir.Value:
    """The other way, to nearest even; NaN stays NaN."""
    lanes = value.type.count
    if kind == "float16" and not _HALVES:
        return _narrow_half(builder, value)
    if kind == "float16":
        half = builder.fptrunc(value, ir.VectorType(F16, lanes))
        return builder.bitcast(half, ir.VectorType(I16, lanes))
    if kind == "bfloat16":
        bits = builder.bitcast(value, ir.VectorType(I32, lanes))
        high = builder.lshr(bits, constant(bits.type, 16))
        odd = builder.and_(high, constant(bits.type, 1))
        rounded = builder.add(bits, builder.add(odd, constant(bits.type, 0x7FFF)))
        quiet = builder.or_(high, constant(bits.type, 0x40))
        is_nan = builder.fcmp_unordered("uno", value, value)
        shifted = builder.lshr(rounded, constant(bits.type, 16))
        return builder.trunc(builder.select(is_nan, quiet, shifted), ir.VectorType(I16, lanes))
    return value


Emit = Callable[[ir.IRBuilder, Sequence[ir.Value]], Any]


def emits(result: types.Type, *parameters: types.Type) -> Callable[[Emit], Any]:
    """Make a function of (builder, arguments) one that compiled code calls.

    As many parameters as the types given here; their types are converted as Numba does.
    """

    def wrap(emit: Emit) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = emit(builder, arguments)
            return context.get_dummy_value() if value is None else value

        names = ", ".join(f"_{i}" for i in range(len(parameters)))
        scope: dict[str, Any] = {"signature": result(*parameters), "generate": generate}
        # Numba reads the number of parameters off the function itself.
        exec(f"def typed(_context, {names}):\n    return signature, generate", scope)
        typed = scope["typed"]
        typed.__name__, typed.__doc__ = emit.__name__.strip("_"), emit.__doc__
        return intrinsic(typed)

    return wrap


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


def prefetch_ir(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch the line at an address, which may be any, into the first-level cache."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    read, first_level, data = I32(0), I32(3), I32(1)
    arguments = [pointer, read, first_level, data]
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
