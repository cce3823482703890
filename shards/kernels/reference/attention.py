"""Attention over the paged cache in plain PyTorch, on any device.

Queries are [.., heads, head_dim], in the cache's dtype; the answer is [.., heads, value_dim].
Softmax is in float32.

Shape letters: T tokens, S sequences, N query heads, K KV heads, G query heads per KV head,
B blocks of a table, C cached tokens, H head_dim, V value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from shards.batch import Int64
from shards.kernels.base import Pattern
from shards.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows `start..stop` of the batch are consecutive positions of one sequence.

    `table_B`: its block table. `context`: tokens in the cache after this step's are written.
    `prompt`: tokens of its prompt, which see each other under a prefix mask.
    """

    start: int
    stop: int
    table_B: torch.Tensor
    context: int
    prompt: int = 0


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that are the newest position of one sequence each.

    `rows_S`: where they lie in the batch. `tables_SB`: block tables, padded with any block.
    `contexts_S`: tokens in each one's cache after this step's are written.
    """

    rows_S: torch.Tensor
    tables_SB: torch.Tensor
    contexts_S: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Groups:
    """Query heads as KV heads x `size`. `places` says where each one is among them; None where
    every group is whole, so that a plain reshape does."""

    kv_heads: int
    size: int
    places: torch.Tensor | None

    @staticmethod
    @cache
    def of(kv_of_head: tuple[int, ...], device: torch.device) -> _Groups:
        kv_heads = kv_of_head[-1] + 1
        size = max(kv_of_head.count(kv) for kv in range(kv_heads))
        if len(kv_of_head) == kv_heads * size:
            return _Groups(kv_heads, size, None)
        places = [kv * size + h - kv_of_head.index(kv) for h, kv in enumerate(kv_of_head)]
        return _Groups(kv_heads, size, torch.tensor(places, device=device))

    def split(self, of_heads: torch.Tensor, axis: int) -> torch.Tensor:
        """Heads along `axis` -> KV heads and their query heads; zeros where a group is short."""
        if self.places is not None:
            shape = list(of_heads.shape)
            shape[axis] = self.kv_heads * self.size
            of_heads = of_heads.new_zeros(shape).index_copy_(axis, self.places, of_heads)
        return torch.unflatten(of_heads, axis, (self.kv_heads, self.size))

    def join(self, of_groups: torch.Tensor, axis: int) -> torch.Tensor:
        """The inverse of `split`."""
        of_heads = of_groups.flatten(axis, axis + 1)
        return of_heads if self.places is None else of_heads.index_select(axis, self.places)


@dataclass(frozen=True, slots=True)
class SpanRows:
    """A step's sequences: those with one row together, those with more one by one."""

    decode: DecodeRows | None
    prefills: tuple[PrefillRows, ...]

    @classmethod
    def of(
        cls,
        spans_S4: Int64,
        tables: Int64,
        prompts_S: Int64 | None,
        block_size: int,
        place: Callable[[Int64], torch.Tensor],
    ) -> SpanRows:
        """`spans_S4`, `tables` and `prompts_S` are a `Batch`'s; `place` puts numbers onto the
        device."""
        single = spans_S4[:, 1] == 1
        decode = None
        if single.any():
            rows = spans_S4[single]
            width = -(-int(rows[:, 2].max()) // block_size)
            decode = DecodeRows(
                place(rows[:, 0].copy()),
                place(tables[rows[:, 3], :width]),
                place(rows[:, 2].copy()),
            )
        prefills = (
            PrefillRows(
                first,
                first + count,
                place(tables[table, : -(-context // block_size)]),
                context,
                0 if prompts_S is None else int(prompts_S[i]),
            )
            for i, (first, count, context, table) in enumerate(spans_S4.tolist())
            if count > 1
        )
        return cls(decode, tuple(prefills))

    def attend(self, q_TNH: torch.Tensor, cache: LayerCache, pattern: Pattern) -> torch.Tensor:
        """[T, N, V]; rows of no sequence hold anything."""
        if self.decode is not None and not self.prefills:
            whole = self.decode.rows_S.shape[0] == q_TNH.shape[0]
            if whole:
                return decode(q_TNH, cache, self.decode, pattern)
        out_TNV = q_TNH.new_empty(*q_TNH.shape[:2], cache.values.shape[3])
        if self.decode is not None:
            rows_S = self.decode.rows_S
            out_TNV[rows_S] = decode(q_TNH[rows_S], cache, self.decode, pattern)
        for chunk in self.prefills:
            span = slice(chunk.start, chunk.stop)
            out_TNV[span] = prefill(q_TNH[span], cache, chunk, pattern)
        return out_TNV


def prefill(
    q_TNH: torch.Tensor, cache: LayerCache, rows: PrefillRows, pattern: Pattern
) -> torch.Tensor:
    """Consecutive positions of one sequence, each seeing the cache up to itself."""
    device, window = q_TNH.device, pattern.window
    first = rows.context - q_TNH.shape[0]
    block_size = cache.keys.shape[2]
    unseen = 0 if window is None else max(0, first + 1 - window) // block_size  # whole blocks
    heads = torch.tensor(pattern.kv_of_head, device=device)
    k_NCH, v_NCV = (
        pool[rows.table_B[unseen:]]  # [B, K, block_size, H]
        .transpose(0, 1)
        .flatten(1, 2)[heads, : rows.context - unseen * block_size]
        for pool in (cache.keys, cache.values)
    )
    q_NTH = q_TNH.transpose(0, 1)
    at_C = torch.arange(unseen * block_size, rows.context, device=device)
    at_T1 = torch.arange(first, rows.context, device=device)[:, None]
    seen_TC = at_C <= at_T1
    if window is not None:
        seen_TC &= at_C > at_T1 - window
    if pattern.is_plain:
        masked = first > 0 or (window is not None and rows.context > window)
        out_NTV = F.scaled_dot_product_attention(
            q_NTH[None],
            k_NCH[None],
            v_NCV[None],
            attn_mask=seen_TC if masked else None,
            is_causal=not masked,
            scale=pattern.scale,
        )[0]
        return out_NTV.transpose(0, 1)
    if pattern.mask == "prefix":
        seen_TC |= (at_C < rows.prompt) & (at_T1 < rows.prompt)
    sinks, slopes = (
        None if of_heads is None else of_heads[:, None, None]
        for of_heads in (pattern.sinks, pattern.slopes)
    )
    logits_NTC = torch.matmul(q_NTH, k_NCH.transpose(1, 2))
    weights_NTC = _weigh(logits_NTC, pattern, seen_TC, at_T1 - at_C, sinks, slopes)
    return torch.matmul(weights_NTC.to(v_NCV.dtype), v_NCV).transpose(0, 1)


def decode(
    q_SNH: torch.Tensor, cache: LayerCache, rows: DecodeRows, pattern: Pattern
) -> torch.Tensor:
    """One newest position of each of S sequences."""
    groups = _Groups.of(pattern.kv_of_head, q_SNH.device)
    tables_SB, at_SC = _seen_blocks(rows, cache.keys.shape[2], pattern.window)
    k_SKCH, v_SKCV = (
        pool[tables_SB]  # [S, B, K, block_size, H]
        .transpose(1, 2)
        .flatten(2, 3)
        for pool in (cache.keys, cache.values)
    )
    away_SC = rows.contexts_S[:, None] - 1 - at_SC
    seen_SC = away_SC >= 0
    if pattern.window is not None:
        seen_SC &= away_SC < pattern.window
    sinks, slopes = (
        None if of_heads is None else groups.split(of_heads[:, None], 0)
        for of_heads in (pattern.sinks, pattern.slopes)
    )
    logits_SKGC = torch.matmul(groups.split(q_SNH, 1), k_SKCH.transpose(2, 3))
    weights_SKGC = _weigh(
        logits_SKGC, pattern, seen_SC[:, None, None], away_SC[:, None, None], sinks, slopes
    )
    return groups.join(torch.matmul(weights_SKGC.to(v_SKCV.dtype), v_SKCV), 1)


def _weigh(
    logits: torch.Tensor,
    pattern: Pattern,
    seen: torch.Tensor,
    away: torch.Tensor,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax weights of q k, float32. `away`: how far a cached token lies behind a query's; all
    but `logits` are broadcast."""
    logits = logits.float() * pattern.scale
    if pattern.softcap is not None:
        logits = pattern.softcap * torch.tanh(logits / pattern.softcap)
    if slopes is not None:
        logits = logits - slopes.float() * away.abs()
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    beside = sinks.float().expand(*logits.shape[:-1], 1)
    return torch.cat((logits, beside), -1).softmax(-1)[..., :-1]


def _seen_blocks(
    rows: DecodeRows, block_size: int, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks to gather, [S, B], and the position of every cached token in them, [S or 1, C].

    Under a window these are the blocks that it reaches, as many for every sequence; where a
    sequence has fewer, positions past its context stand for the rest.
    """
    tables_SB, device = rows.tables_SB, rows.tables_SB.device
    width = tables_SB.shape[1]
    if window is None or width * block_size <= window + block_size:
        return tables_SB, torch.arange(width * block_size, device=device)[None]
    reach = -(-window // block_size) + 1
    first_S1 = (rows.contexts_S[:, None] - window).clamp(min=0) // block_size
    places_SB = first_S1 + torch.arange(reach, device=device)
    gathered_SB = tables_SB.gather(1, places_SB.clamp(max=width - 1))
    at_SC = first_S1 * block_size + torch.arange(reach * block_size, device=device)
    return gathered_SB, at_SC
