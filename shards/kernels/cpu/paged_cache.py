"""The paged KV cache on the host: its order in memory, and its dtypes as compiled code knows them.

Inside a block keys lie channel by channel, [head_dim, block_size], so that the positions of a block
are the lanes of a vector and a score needs no sum across lanes; values lie [block_size, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shards.kernels.cpu.emission import (
    F32,
    I16,
    LANES,
    constant,
    load_ir,
    narrow_ir,
    store_ir,
    widen_ir,
)
from shards.kernels.cpu.simd import floats
from shards.kv_cache import LayerCache, zeros

# Numba keeps a compiled closure on disk only where plain constants tell it from its sisters, so
# compiled code knows a cached dtype by its place here.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_NAMES: Final = ("float32", "bfloat16", "float16")
_ELEMENTS: Final = (F32, I16, I16)


def allocate_cache(
    blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> LayerCache:
    """An empty layer: both tensors [blocks, kv_heads, block_size, head_dim], keys transposed.

    Pages are handed out as blocks are first written. Raises `ValueError` for a dtype the kernels do
    not read.
    """
    dtype_code(dtype)
    host = torch.device("cpu")
    keys = zeros((blocks, kv_heads, head_dim, block_size), dtype, host)
    values = zeros((blocks, kv_heads, block_size, head_dim), dtype, host)
    return LayerCache(keys.transpose(2, 3), values)


def dtype_code(dtype: torch.dtype) -> int:
    """The dtype's place in `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(
            f"a KV cache of {dtype}: the CPU kernels read {', '.join(_NAMES)}; choose one of them"
        )
    return DTYPES.index(dtype)


def check_order(cache: LayerCache) -> None:
    """Raises `ValueError` for a cache that `allocate_cache` did not lay out."""
    keys, values = cache.keys.transpose(2, 3), cache.values
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"KV cache with strides {cache.keys.stride()} and {values.stride()}: the CPU kernels "
            "read keys channel by channel inside a block; allocate it with `allocate_cache`"
        )


Emit = Callable[[ir.IRBuilder, int, Sequence[ir.Value]], Any]


def emits_by_dtype(result: types.Type, *parameters: types.Type) -> Callable[[Emit], Any]:
    """`simd.emits` for a function whose first argument is a constant: a place in `DTYPES`."""

    def wrap(emit: Emit) -> Any:
        def typed(code: types.IntegerLiteral) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                value = emit(builder, code.literal_value, arguments[1:])
                return context.get_dummy_value() if value is None else value

            return result(code, *parameters), generate

        # Numba reads the number of parameters off the function itself.
        names = ", ".join(f"_{i}" for i in range(len(parameters)))
        scope: dict[str, Any] = {"typed": typed}
        exec(f"def declared(_context, code, {names}):\n    return typed(code)", scope)
        declared = scope["declared"]
        declared.__name__, declared.__doc__ = emit.__name__.strip("_"), emit.__doc__
        return intrinsic(prefer_literal=True)(declared)

    return wrap


def bytes_of(code: int) -> int:
    """Of one cached number."""
    return DTYPES[code].itemsize


def load_wide(builder: ir.IRBuilder, code: int, address: ir.Value, lanes: int) -> ir.Value:
    """`lanes` cached numbers as float32."""
    bits = load_ir(builder, address, ir.VectorType(_ELEMENTS[code], lanes))
    return widen_ir(builder, bits, _NAMES[code])


@emits_by_dtype(types.void, types.int64, types.int64)
def copy_cached(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> None:
    """One cached number: (target, source)."""
    target, source = arguments
    store_ir(builder, load_ir(builder, source, _ELEMENTS[code]), target)


@emits_by_dtype(floats, floats)
def finite(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> ir.Value:
    """0 for NaN, the dtype's largest number for what lies beyond it."""
    (x,) = arguments
    zero, most = constant(x.type, 0.0), torch.finfo(DTYPES[code]).max
    x = builder.select(builder.fcmp_unordered("uno", x, x), zero, x)
    for sign, beyond in ((1.0, ">"), (-1.0, "<")):
        limit = constant(x.type, sign * most)
        x = builder.select(builder.fcmp_ordered(beyond, x, limit), limit, x)
    return x


@emits_by_dtype(types.void, types.int64, floats)
def store_cached(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> None:
    """LANES float32, narrowed to nearest even."""
    store_ir(builder, narrow_ir(builder, arguments[1], _NAMES[code]), arguments[0])


@emits_by_dtype(types.void, types.int64, types.int64, floats, types.int64)
def scatter_cached(builder: ir.IRBuilder, code: int, arguments: Sequence[ir.Value]) -> None:
    """The first `count` lanes, narrowed, one every `stride` bytes: (address, stride, x, count)."""
    address, stride, x, count = arguments
    narrow = narrow_ir(builder, x, _NAMES[code])
    for lane in range(LANES):
        index = ir.IntType(64)(lane)
        with builder.if_then(builder.icmp_signed("<", index, count), likely=True):
            value = builder.extract_element(narrow, index)
            store_ir(builder, value, builder.add(address, builder.mul(stride, index)))
