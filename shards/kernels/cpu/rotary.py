"""Rotary embedding (arXiv:2104.09864) of queries and keys, and keys and values into the cache."""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, operand, share
from shards.kernels.cpu.paged_cache import (
    bytes_of,
    check_order,
    dtype_code,
    finite,
    scatter_cached,
    store_cached,
)
from shards.kernels.cpu.simd import load, load_f32, load_i64, load_part, store, store_f32
from shards.kv_cache import LayerCache


class AngleOperand(IntEnum):
    """Addresses, unless said otherwise."""

    POSITIONS = 0  # int64 [rows]
    INVERSE = 1  # float32 [pairs]
    COS = 2  # float32 [rows, pairs]
    SIN = 3  # float32 [rows, pairs]
    PAIRS = 4  # a number
    FACTOR = 5  # float32 [1]


def angles(
    positions: torch.Tensor,
    inverse: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    factor: float = 1.0,
) -> tuple[Instruction, ...]:
    """cos[r, i] and sin[r, i] = factor x cosine and sine of positions[r] x inverse[i].

    positions: int64 [max_rows]; inverse: float32 [pairs]; cos, sin: float32 [max_rows, pairs].
    """
    inverse, factors = inverse.float().contiguous(), torch.tensor([factor])
    operands = {
        AngleOperand.POSITIONS: positions.data_ptr(),
        AngleOperand.INVERSE: inverse.data_ptr(),
        AngleOperand.COS: cos.data_ptr(),
        AngleOperand.SIN: sin.data_ptr(),
        AngleOperand.PAIRS: inverse.numel(),
        AngleOperand.FACTOR: factors.data_ptr(),
    }
    keeps = (positions, inverse, cos, sin, factors)
    return (Instruction(_ANGLES, tuple(operands[name] for name in AngleOperand), keeps),)


def _angles(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    pairs = operand(operands, AngleOperand.PAIRS)
    factor = load_f32(operand(operands, AngleOperand.FACTOR))
    first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
    for row in range(first, stop):
        position = np.float32(load_i64(operand(operands, AngleOperand.POSITIONS) + 8 * row))
        for i in range(pairs):
            angle = position * load_f32(operand(operands, AngleOperand.INVERSE) + 4 * i)
            at = 4 * (pairs * row + i)
            store_f32(operand(operands, AngleOperand.COS) + at, math.cos(angle) * factor)
            store_f32(operand(operands, AngleOperand.SIN) + at, math.sin(angle) * factor)
    return 0


_ANGLES = Kernel(_angles)


class Operand(IntEnum):
    """Addresses, unless said otherwise."""

    QKV = 0  # float32 [rows, (heads + 2 kv_heads) * head_dim]
    QKV_BYTES = 1  # from row to row
    HEADS = 2  # a number
    KV_HEADS = 3  # a number
    HEAD_DIM = 4  # a number
    KEYS = 5  # [blocks, kv_heads, head_dim, block_size]
    VALUES = 6  # [blocks, kv_heads, block_size, head_dim]
    BLOCK_SIZE = 7  # a number
    BLOCKS = 8  # int64 [rows]
    OFFSETS = 9  # int64 [rows]
    COS = 10  # float32 [rows, pairs]
    SIN = 11  # float32 [rows, pairs]
    PAIRS = 12  # a number; 0: no rotation
    INTERLEAVED = 13  # 1: pairs are neighbours


def rotate_and_cache(
    qkv: torch.Tensor,
    cache: LayerCache,
    *,
    heads: int,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
) -> tuple[Instruction, ...]:
    """Rotate each row's queries and keys in place; keys and values go to blocks[r], offsets[r].

    qkv: float32 [max_rows, (heads + 2 kv_heads) * head_dim], q | k | v. blocks, offsets: int64
    [max_rows]. `turn`: what `angles` wrote; None leaves q and k as they are. Values are made finite
    on the way: see `LayerCache`. Raises `ValueError` for a cache of another order or dtype.
    """
    check_order(cache)
    _, kv_heads, block_size, head_dim = cache.keys.shape
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"q | k | v rows of {qkv.shape[1]}, but {heads} heads and twice {kv_heads} KV heads of "
            f"{head_dim} are {(heads + 2 * kv_heads) * head_dim}"
        )
    operands = {
        Operand.QKV: qkv.data_ptr(),
        Operand.QKV_BYTES: 4 * qkv.stride(0),
        Operand.HEADS: heads,
        Operand.KV_HEADS: kv_heads,
        Operand.HEAD_DIM: head_dim,
        Operand.KEYS: cache.keys.data_ptr(),
        Operand.VALUES: cache.values.data_ptr(),
        Operand.BLOCK_SIZE: block_size,
        Operand.BLOCKS: blocks.data_ptr(),
        Operand.OFFSETS: offsets.data_ptr(),
        Operand.COS: 0 if turn is None else turn[0].data_ptr(),
        Operand.SIN: 0 if turn is None else turn[1].data_ptr(),
        Operand.PAIRS: 0 if turn is None else turn[0].shape[1],
        Operand.INTERLEAVED: int(interleaved),
    }
    keeps = (qkv, cache, blocks, offsets, turn)
    kernel = _rotate_kernel(dtype_code(cache.keys.dtype))
    return (Instruction(kernel, tuple(operands[name] for name in Operand), keeps),)


@njit
def _rotate(x: Any, cos: Any, sin: Any, pairs: Any, interleaved: Any) -> None:
    """Turn the first 2 x pairs channels of a head."""
    start = 0
    if not interleaved:
        start = pairs // LANES * LANES
        for i in range(0, 4 * start, 4 * LANES):
            a, b = load(x + i), load(x + i + 4 * pairs)
            c, s = load(cos + i), load(sin + i)
            store(x + i, a * c - b * s)
            store(x + i + 4 * pairs, b * c + a * s)
    for i in range(start, pairs):
        at_a, at_b = (x + 8 * i, x + 8 * i + 4) if interleaved else (x + 4 * i, x + 4 * (i + pairs))
        a_1, b_1 = load_f32(at_a), load_f32(at_b)
        c_1, s_1 = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
        store_f32(at_a, a_1 * c_1 - b_1 * s_1)
        store_f32(at_b, b_1 * c_1 + a_1 * s_1)


@cache
def _rotate_kernel(code: int) -> Kernel:
    """For a cache whose dtype is `paged_cache.DTYPES[code]`."""
    size = bytes_of(code)

    def rotated(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
        heads, kv_heads = operand(operands, Operand.HEADS), operand(operands, Operand.KV_HEADS)
        head_dim, pairs = operand(operands, Operand.HEAD_DIM), operand(operands, Operand.PAIRS)
        block_size = operand(operands, Operand.BLOCK_SIZE)
        whole, rest = head_dim // LANES * LANES, head_dim % LANES
        first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
        for row in range(first, stop):
            q = operand(operands, Operand.QKV) + row * operand(operands, Operand.QKV_BYTES)
            cos = operand(operands, Operand.COS) + 4 * pairs * row
            sin = operand(operands, Operand.SIN) + 4 * pairs * row
            interleaved = operand(operands, Operand.INTERLEAVED)
            for head in range(heads + kv_heads):
                _rotate(q + 4 * head_dim * head, cos, sin, pairs, interleaved)
            block = load_i64(operand(operands, Operand.BLOCKS) + 8 * row)
            offset = load_i64(operand(operands, Operand.OFFSETS) + 8 * row)
            for kv in range(kv_heads):
                k = q + 4 * head_dim * (heads + kv)
                v = k + 4 * head_dim * kv_heads
                at = (block * kv_heads + kv) * block_size * head_dim
                to_k = operand(operands, Operand.KEYS) + size * (at + offset)
                to_v = operand(operands, Operand.VALUES) + size * (at + offset * head_dim)
                stride = size * block_size
                for d in range(0, whole, LANES):
                    scatter_cached(code, to_k + stride * d, stride, load(k + 4 * d), LANES)
                    store_cached(code, to_v + size * d, finite(code, load(v + 4 * d)))
                if rest:
                    x = load_part(k + 4 * whole, rest)
                    scatter_cached(code, to_k + stride * whole, stride, x, rest)
                    x = finite(code, load_part(v + 4 * whole, rest))
                    scatter_cached(code, to_v + size * whole, size, x, rest)
        return 0

    return Kernel(rotated)
