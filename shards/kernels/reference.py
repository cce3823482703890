"""Attention in plain PyTorch, on any device: what every other kernel set is held to.

Shape letters: T tokens, S sequences, N query heads, K KV heads, G query heads per KV head,
B blocks of a table, C cached tokens, H head_dim.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from shards.batch import DecodeRows, PrefillRows
from shards.kv_cache import LayerCache


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


class ReferenceAttention:
    """`AttentionKernel` over gathered blocks."""

    def prefill(
        self,
        q_TNH: torch.Tensor,
        cache: LayerCache,
        rows: PrefillRows,
        kv_of_head: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        count = q_TNH.shape[0]
        first = rows.context - count
        heads = torch.tensor(kv_of_head, device=q_TNH.device)
        k_NCH, v_NCH = (
            pool[rows.table_B]  # [B, K, block_size, H]
            .transpose(0, 1)
            .flatten(1, 2)[heads, : rows.context]
            for pool in (cache.keys, cache.values)
        )
        mask = None
        if first > 0:
            seen_C = torch.arange(rows.context, device=q_TNH.device)
            mask = seen_C <= torch.arange(first, rows.context, device=q_TNH.device)[:, None]
        out_NTH = F.scaled_dot_product_attention(
            q_TNH.transpose(0, 1)[None],
            k_NCH[None],
            v_NCH[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )[0]
        return out_NTH.transpose(0, 1)

    def decode(
        self,
        q_SNH: torch.Tensor,
        cache: LayerCache,
        rows: DecodeRows,
        kv_of_head: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        sequences, _heads, head_dim = q_SNH.shape
        kv_heads, group, places = _padded_groups(kv_of_head, q_SNH.device)
        if places is None:
            q = q_SNH
        else:
            q = q_SNH.new_zeros(sequences, kv_heads * group, head_dim)
            q[:, places] = q_SNH
        q_SKGH = q.view(sequences, kv_heads, group, head_dim)
        k_SKCH, v_SKCH = (
            pool[rows.tables_SB]  # [S, B, K, block_size, H]
            .transpose(1, 2)
            .flatten(2, 3)
            for pool in (cache.keys, cache.values)
        )
        scores = torch.matmul(q_SKGH, k_SKCH.transpose(2, 3)).float() * scale  # [S, K, G, C]
        unseen_SC = torch.arange(scores.shape[3], device=q.device) >= rows.contexts_S[:, None]
        scores.masked_fill_(unseen_SC[:, None, None], float("-inf"))
        out = torch.matmul(scores.softmax(-1).to(v_SKCH.dtype), v_SKCH)
        out_SNH = out.reshape(sequences, kv_heads * group, head_dim)
        return out_SNH if places is None else out_SNH[:, places]
