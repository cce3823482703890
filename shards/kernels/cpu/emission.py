"""LLVM IR by the piece: what kernels are emitted with, for the processor that LLVM compiles for.

Addresses are int64. A vector has `LANES` float32; 16-bit numbers are widened as they are loaded
and rounded to nearest even as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# What LLVM compiles for: NUMBA_CPU_FEATURES and NUMBA_CPU_NAME change it, as everywhere in Numba.


def _features() -> frozenset[str]:
    given = config.CPU_FEATURES
    if given is None and config.CPU_NAME in (None, "host"):
        given = llvm.get_host_cpu_features().flatten()
    return frozenset(name[1:] for name in (given or "").split(",") if name.startswith("+"))


FEATURES = _features()
LANES = 16 if "avx512f" in FEATURES else 8 if "avx2" in FEATURES else 4
REGISTERS = 32 if LANES == 16 or "neon" in FEATURES else 16
BYTES = 4 * LANES


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


def prefetch_ir(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch the line at an address, which may be any, into the first-level cache."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    read, first_level, data = I32(0), I32(3), I32(1)
    arguments = [pointer, read, first_level, data]
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
