"""Attention over the paged cache in plain PyTorch, on any device.

Queries are [.., heads, head_dim], in the cache's dtype; the answer has the same shape. Softmax is
in float32.

Shape letters: T tokens, S sequences, N query heads, K KV heads, G query heads per KV head,
B blocks of a table, C cached tokens, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from shards.kernels.base import Pattern
from shards.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows `start..stop` of the batch are consecutive positions of one sequence.

    `table_B`: its block table. `context`: tokens in the cache after this step's are written.
    """

    start: int
    stop: int
    table_B: torch.Tensor
    context: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that are the newest position of one sequence each.

    `rows_S`: where they lie in the batch. `tables_SB`: block tables, padded with any block.
    `contexts_S`: tokens in each one's cache after this step's are written.
    """

    rows_S: torch.Tensor
    tables_SB: torch.Tensor
    contexts_S: torch.Tensor


@cache
def _padded_groups(
    kv_of_head: tuple[int, ...], device: torch.device
) -> tuple[int, int, torch.Tensor | None]:
    """KV heads, group size, and each query head's place among [KV heads x group size].

    The place is None where every group is whole, so that a plain reshape does.
    """
    kv_heads = kv_of_head[-1] + 1
    group = max(kv_of_head.count(kv) for kv in range(kv_heads))
    if len(kv_of_head) == kv_heads * group:
        return kv_heads, group, None
    places = [kv * group + h - kv_of_head.index(kv) for h, kv in enumerate(kv_of_head)]
    return kv_heads, group, torch.tensor(places, device=device)


def prefill(
    q_TNH: torch.Tensor, cache: LayerCache, rows: PrefillRows, pattern: Pattern
) -> torch.Tensor:
    """Consecutive positions of one sequence, each seeing the cache up to itself."""
    device, window = q_TNH.device, pattern.window
    first = rows.context - q_TNH.shape[0]
    block_size = cache.keys.shape[2]
    unseen = 0 if window is None else max(0, first + 1 - window) // block_size  # whole blocks
    heads = torch.tensor(pattern.kv_of_head, device=device)
    k_NCH, v_NCH = (
        pool[rows.table_B[unseen:]]  # [B, K, block_size, H]
        .transpose(0, 1)
        .flatten(1, 2)[heads, : rows.context - unseen * block_size]
        for pool in (cache.keys, cache.values)
    )
    mask_TC = None
    if first > 0 or (window is not None and rows.context > window):
        at_C = torch.arange(unseen * block_size, rows.context, device=device)
        at_T1 = torch.arange(first, rows.context, device=device)[:, None]
        mask_TC = at_C <= at_T1
        if window is not None:
            mask_TC &= at_C > at_T1 - window
    out_NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_NCH[None],
        v_NCH[None],
        attn_mask=mask_TC,
        is_causal=mask_TC is None,
        scale=pattern.scale,
    )[0]
    return out_NTH.transpose(0, 1)


def decode(
    q_SNH: torch.Tensor, cache: LayerCache, rows: DecodeRows, pattern: Pattern
) -> torch.Tensor:
    """One newest position of each of S sequences."""
    sequences, _, head_dim = q_SNH.shape
    kv_heads, group, places = _padded_groups(pattern.kv_of_head, q_SNH.device)
    if places is None:
        q = q_SNH
    else:
        q = q_SNH.new_zeros(sequences, kv_heads * group, head_dim)
        q[:, places] = q_SNH
    q_SKGH = q.view(sequences, kv_heads, group, head_dim)
    tables_SB, at_SC = _seen_blocks(rows, cache.keys.shape[2], pattern.window)
    k_SKCH, v_SKCH = (
        pool[tables_SB]  # [S, B, K, block_size, H]
        .transpose(1, 2)
        .flatten(2, 3)
        for pool in (cache.keys, cache.values)
    )
    scores = torch.matmul(q_SKGH, k_SKCH.transpose(2, 3)).float() * pattern.scale  # [S,K,G,C]
    contexts_S1 = rows.contexts_S[:, None]
    unseen_SC = at_SC >= contexts_S1
    if pattern.window is not None:
        unseen_SC |= at_SC < contexts_S1 - pattern.window
    scores.masked_fill_(unseen_SC[:, None, None], float("-inf"))
    out = torch.matmul(scores.softmax(-1).to(v_SKCH.dtype), v_SKCH)
    out_SNH = out.reshape(sequences, kv_heads * group, head_dim)
    return out_SNH if places is None else out_SNH[:, places]


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
