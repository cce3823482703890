"""Attention over the paged KV cache as an instruction."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from shards.kernels.base import Pattern
from shards.kernels.cpu.attention_kernel import attention_kernel
from shards.kernels.cpu.attention_operands import Operand, scratch_parts
from shards.kernels.cpu.kernel import Instruction
from shards.kernels.cpu.paged_cache import check_order, dtype_code
from shards.kv_cache import LayerCache

_LOWEST: Final = float(np.finfo(np.float32).min)
_LOG2_E: Final = math.log2(math.e)
_LINE: Final = 64  # bytes of a cache line


class AttentionScratch:
    """Working memory of `threads` threads, for all layers whose heads are this wide."""

    def __init__(self, head_dim: int, threads: int) -> None:
        self.head_dim = head_dim
        sizes = [-(-size // _LINE) * _LINE for size in scratch_parts(head_dim)]
        self.nbytes = sum(sizes)
        self.parts = torch.tensor([sum(sizes[:part]) for part in range(len(sizes))])
        self._memory = torch.zeros(threads * self.nbytes + _LINE, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return -(-self._memory.data_ptr() // _LINE) * _LINE


def attention(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: LayerCache,
    pattern: Pattern,
    spans: torch.Tensor,
    tables: torch.Tensor,
    scratch: AttentionScratch,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> tuple[Instruction, ...]:
    """out[r] = softmax(scale q[r] K^T) V over what r may see, for every row of the step's spans.

    q, out: float32 [max_rows, heads * head_dim], each possibly columns of a wider buffer. spans:
    int64 [most spans, 4] = (first row, rows, context after this step's tokens are written, row of
    its block table), header[SPANS] of them. tables: int64, header[TABLE] block ids a row. Blocks
    wholly before a window may hold anything.

    `softcap` c makes a logit c tanh(logit / c). `sinks` [heads] are logits that join each head's
    softmax without a value. `slopes` [heads]: a logit falls by slope x distance (ALiBi,
    arXiv:2108.12409). Raises `ValueError` where shapes or dtypes do not fit each other.
    """
    _, kv_heads, block_size, head_dim = cache.keys.shape
    _check(q, out, cache, pattern, spans, tables, scratch)
    groups = torch.tensor(
        [(pattern.kv_of_head.index(kv), pattern.kv_of_head.count(kv)) for kv in range(kv_heads)]
    )
    per_head = torch.zeros(pattern.heads, 3)
    per_head[:, 0] = _LOWEST if sinks is None else sinks.float() * _LOG2_E
    per_head[:, 1] = 0.0 if sinks is None else 1.0
    per_head[:, 2] = 0.0 if slopes is None else slopes.float() * _LOG2_E
    factors = torch.tensor([pattern.scale * _LOG2_E, (softcap or 0.0) * _LOG2_E])
    operands = {
        Operand.QUERIES: q.data_ptr(),
        Operand.QUERY_BYTES: 4 * q.stride(0),
        Operand.OUT: out.data_ptr(),
        Operand.OUT_BYTES: 4 * out.stride(0),
        Operand.KEYS: cache.keys.data_ptr(),
        Operand.VALUES: cache.values.data_ptr(),
        Operand.KV_HEADS: kv_heads,
        Operand.BLOCK_SIZE: block_size,
        Operand.HEAD_DIM: head_dim,
        Operand.SPANS: spans.data_ptr(),
        Operand.TABLES: tables.data_ptr(),
        Operand.GROUPS: groups.data_ptr(),
        Operand.HEADS: per_head.data_ptr(),
        Operand.FACTORS: factors.data_ptr(),
        Operand.WINDOW: pattern.window or 0,
        Operand.CAPPED: int(softcap is not None),
        Operand.SLOPED: int(slopes is not None),
        Operand.SCRATCH: scratch.address,
        Operand.SCRATCH_BYTES: scratch.nbytes,
        Operand.PARTS: scratch.parts.data_ptr(),
    }
    kernel = attention_kernel(dtype_code(cache.keys.dtype))
    keeps = (q, out, cache, spans, tables, groups, per_head, factors, scratch)
    return (Instruction(kernel, tuple(operands[name] for name in Operand), keeps),)


def _check(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: LayerCache,
    pattern: Pattern,
    spans: torch.Tensor,
    tables: torch.Tensor,
    scratch: AttentionScratch,
) -> None:
    check_order(cache)
    kv_heads, head_dim = cache.keys.shape[1], cache.keys.shape[3]
    width = pattern.heads * head_dim
    for name, buffer in (("q", q), ("out", out)):
        if buffer.dtype != torch.float32 or buffer.shape[1] != width or buffer.stride(1) != 1:
            raise ValueError(
                f"{name}: {buffer.dtype} of shape {tuple(buffer.shape)}; attention of "
                f"{pattern.heads} heads x {head_dim} needs rows of {width} float32"
            )
    for name, numbers in (("spans", spans), ("tables", tables)):
        if numbers.dtype != torch.int64 or not numbers.is_contiguous():
            raise ValueError(
                f"{name}: {numbers.dtype}, strides {numbers.stride()}; needs int64 "
                "in rows without gaps"
            )
    if sorted(set(pattern.kv_of_head)) != list(range(kv_heads)):
        raise ValueError(
            f"kv_of_head {pattern.kv_of_head} over a cache of {kv_heads} KV heads: a query head "
            "must read each of them"
        )
    if scratch.head_dim != head_dim:
        raise ValueError(
            f"scratch for {scratch.head_dim} channels a head, but the cache has {head_dim}"
        )
