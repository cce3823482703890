"""What a compiled kernel looks like from outside, and how kernels are cached.

A kernel is one function of four int64: (operands, step, thread, threads). `operands` is the address
of its own int64 operands, fixed when a program is recorded: addresses and sizes. `step` is the
address of the step's header, `Header`. The threads of a rank call it side by side, each for its
share of the work; it returns 0, or a status that ends the program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Final

import numba
from llvmlite import ir
from numba import types

from shards import compile_cache  # noqa: F401 - sets where what follows is kept
from shards.kernels.cpu.emission import I64, emits
from shards.kernels.cpu.simd import load_i64


class Header(IntEnum):
    """Fields of a step's header, int64 each."""

    ROWS = 0  # tokens of the step
    SPANS = 1  # sequences of the step, each a run of rows
    SAMPLED = 2  # rows whose logits are wanted
    TABLE = 3  # blocks from one sequence's block table to the next one's


_SIGNATURE: Final = types.int64(types.int64, types.int64, types.int64, types.int64)


class Kernel:
    """A compiled function of (operands, step, thread, threads), compiled when first asked for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__

    @cached_property
    def _compiled(self) -> Any:
        try:
            return numba.cfunc(_SIGNATURE, cache=True)(self._function)
        except RuntimeError:  # no folder to cache in can be written
            return numba.cfunc(_SIGNATURE)(self._function)

    @property
    def address(self) -> int:
        """Of the compiled function."""
        return int(self._compiled.address)


@dataclass(frozen=True)
class Instruction:
    """A kernel and what it works on. `keeps` holds the owners of the memory operands point to."""

    kernel: Kernel
    operands: tuple[int, ...]
    keeps: tuple[Any, ...] = ()


@emits(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
def call(builder: ir.IRBuilder, arguments: Any) -> ir.Value:
    """Call the kernel at an address: (address, operands, step, thread, threads) -> status."""
    signature = ir.FunctionType(I64, [I64] * 4)
    function = builder.inttoptr(arguments[0], signature.as_pointer())
    return builder.call(function, arguments[1:])


@numba.njit
def operand(operands: Any, index: Any) -> Any:
    return load_i64(operands + 8 * index)


@numba.njit
def share(count: Any, unit: Any, thread: Any, threads: Any) -> Any:
    """The part `start, stop` of `count` things that a thread works on, in whole units."""
    units = -(-count // unit)
    return (
        min(count, units * thread // threads * unit),
        min(count, units * (thread + 1) // threads * unit),
    )
