"""Sums of products of four quantised weights and four activations, in every 32-bit lane, as IR.

Each class adds them up with the instructions of some processors; the sums are exact, so that all
give the same bits. Weights' codes are bytes of 0 to 255, activations of -127 to 127.
"""

from __future__ import annotations

from typing import Final, Protocol

from llvmlite import ir

from shards.kernels.cpu.emission import FEATURES, I8, I16, LANES, call_llvm, constant, suffix
from shards.kernels.cpu.simd import integers

WORDS: Final = integers.ir
BYTE_LANES: Final = ir.VectorType(I8, 4 * LANES)
_SHORT_LANES: Final = ir.VectorType(I16, 2 * LANES)


class Dot(Protocol):
    """A running sum of (code - zero) * x, of codes below 2^`bits`.

    `zero` is 0 or a power of two; `minus_sum` is minus the sum of all the x that will be added, so
    that zero * minus_sum may stand for what `zero` takes away.
    """

    def __init__(
        self, builder: ir.IRBuilder, bits: int, zero: int, minus_sum: ir.Value
    ) -> None: ...

    def add(self, codes: ir.Value, x: ir.Value) -> None:
        """Both BYTE_LANES."""
        ...

    def sum(self) -> ir.Value:
        """WORDS; nothing is added afterwards."""
        ...


def _times(builder: ir.IRBuilder, zero: int, minus_sum: ir.Value) -> ir.Value:
    if zero == 0:
        return constant(WORDS, 0)
    return builder.shl(minus_sum, constant(WORDS, zero.bit_length() - 1))


class _Vnni:
    """vpdpbusd does it all."""

    def __init__(self, builder: ir.IRBuilder, bits: int, zero: int, minus_sum: ir.Value) -> None:
        self._builder, self._sum = builder, _times(builder, zero, minus_sum)

    def add(self, codes: ir.Value, x: ir.Value) -> None:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        self._sum = call_llvm(self._builder, name, WORDS, [self._sum, codes, x])

    def sum(self) -> ir.Value:
        return self._sum


class _Pairs:
    """pmaddubsw adds two products in 16 bits, and as many of its results as fit are added there.

    8-bit codes would overflow: `zero` is taken off, and what is left gives its sign to x.
    """

    def __init__(self, builder: ir.IRBuilder, bits: int, zero: int, minus_sum: ir.Value) -> None:
        self._builder, self._signed = builder, bits == 8
        self._zero = constant(BYTE_LANES, zero)
        self._sum = _times(builder, 0 if self._signed else zero, minus_sum)
        largest = 1 << (bits - 1) if self._signed else (1 << bits) - 1
        self._most = 0x7FFF // (2 * 127 * largest)
        self._pairs = constant(_SHORT_LANES, 0)
        self._count = 0

    def add(self, codes: ir.Value, x: ir.Value) -> None:
        builder = self._builder
        if self._signed:
            signed = builder.sub(codes, self._zero)
            x = _with_sign(builder, x, signed)
            name = f"llvm.abs.{suffix(BYTE_LANES)}"
            codes = call_llvm(builder, name, BYTE_LANES, [signed, ir.IntType(1)(0)])
        pairs = call_llvm(builder, f"llvm.x86.{_PMADDUBSW}", _SHORT_LANES, [codes, x])
        self._pairs = builder.add(self._pairs, pairs) if self._count else pairs
        self._count += 1
        if self._count == self._most:
            self._flush()
            self._sum = _in_order(builder, self._sum)
        else:
            self._pairs = _in_order(builder, self._pairs)

    def _flush(self) -> None:
        arguments = [self._pairs, constant(_SHORT_LANES, 1)]
        sums = call_llvm(self._builder, f"llvm.x86.{_PMADDWD}", WORDS, arguments)
        self._sum = self._builder.add(self._sum, sums)
        self._count = 0

    def sum(self) -> ir.Value:
        if self._count:
            self._flush()
        return self._sum


def _in_order(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same value, computed here: LLVM would start many sums and spill them."""
    signature = ir.FunctionType(value.type, [value.type])
    return builder.asm(signature, "", "=v,0", [value], side_effect=True)


def _with_sign(builder: ir.IRBuilder, x: ir.Value, signed: ir.Value) -> ir.Value:
    """x, or -x where `signed` is negative; anything where it is 0."""
    if _PSIGNB is not None:
        return call_llvm(builder, f"llvm.x86.{_PSIGNB}", BYTE_LANES, [x, signed])
    is_negative = builder.icmp_signed("<", signed, constant(BYTE_LANES, 0))
    return builder.select(is_negative, builder.neg(x), x)


class _Plain:
    """Shifts and multiplications, for any processor."""

    def __init__(self, builder: ir.IRBuilder, bits: int, zero: int, minus_sum: ir.Value) -> None:
        self._builder, self._sum = builder, _times(builder, zero, minus_sum)

    def add(self, codes: ir.Value, x: ir.Value) -> None:
        builder = self._builder
        codes, x = (builder.bitcast(value, WORDS) for value in (codes, x))
        top = constant(WORDS, 24)
        for byte in range(4):
            up = constant(WORDS, 24 - 8 * byte)
            code = builder.lshr(builder.shl(codes, up), top)
            product = builder.mul(code, builder.ashr(builder.shl(x, up), top))
            self._sum = builder.add(self._sum, product)

    def sum(self) -> ir.Value:
        return self._sum


_PMADDUBSW, _PMADDWD, _PSIGNB = {
    4: ("ssse3.pmadd.ub.sw.128", "sse2.pmadd.wd", "ssse3.psign.b.128"),
    8: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd", "avx2.psign.b"),
    16: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512", None),
}[LANES]


def _fastest() -> type[Dot]:
    def has(*features: str) -> bool:
        return FEATURES.issuperset(features)

    if has("avx512vnni", "avx512vl") or (LANES == 8 and has("avxvnni")):
        return _Vnni
    if has({4: "ssse3", 8: "avx2", 16: "avx512bw"}[LANES]):
        return _Pairs
    return _Plain


DOT: Final = _fastest()
