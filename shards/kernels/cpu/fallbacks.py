"""What has no compiled kernel: Python calls of the reference's code on a program's buffers.

Each is a function of the rows of the step. Correct first: a model that takes one of these ways
leaves compiled code once a layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kernels.base import HeadNorms, Latent, Pattern, Rotation
from shards.kernels.cpu.matrix import CpuMatrix
from shards.kernels.reference import latent as absorbed
from shards.kernels.reference.attention import SpanRows
from shards.kernels.reference.elementwise import norm_heads, rotate
from shards.kv_cache import LayerCache

Call = Callable[[int], None]
GetBatch = Callable[[], Batch]


def norm_joint_heads(
    qkv: torch.Tensor, pattern: Pattern, head_dim: int, norms: HeadNorms, collective: Collective
) -> Call:
    """Queries and keys in `qkv` [max_rows, q | k | v] normed in place, over the heads of all ranks:
    an all-reduce of two numbers a token."""
    q_width, k_width = pattern.heads * head_dim, pattern.kv_heads * head_dim
    q, k = qkv[:, :q_width], qkv[:, q_width : q_width + k_width]

    def run(rows: int) -> None:
        q_TNH, k_TKH = (torch.unflatten(x[:rows], 1, (-1, head_dim)) for x in (q, k))
        normed_q, normed_k = norm_heads(q_TNH, k_TKH, norms, collective)
        q_TNH.copy_(normed_q)
        k_TKH.copy_(normed_k)

    return run


def attend(
    q: torch.Tensor, out: torch.Tensor, pattern: Pattern, cache: LayerCache, batch: GetBatch
) -> Call:
    """Attention under a mask that the kernel does not know.

    `q`, `out`: [max_rows, heads * head_dim].
    """

    def run(rows: int) -> None:
        q_TNH = torch.unflatten(q[:rows], 1, (pattern.heads, -1))
        out[:rows] = _attend(q_TNH, pattern, cache, batch()).flatten(1)

    return run


def attend_latent(
    queries: torch.Tensor,
    latents: torch.Tensor,
    out: torch.Tensor,
    latent: Latent[CpuMatrix],
    pattern: Pattern,
    rotation: Rotation,
    turn: tuple[torch.Tensor, torch.Tensor],
    cache: LayerCache,
    batch: GetBatch,
) -> Call:
    """Latent attention, but for its linear layers. `queries` [max_rows, N * (nope + R)], `latents`
    [max_rows, L + R], `out` [max_rows, N * value]; `turn`: cosines and sines [max_rows, R / 2]."""

    def run(rows: int) -> None:
        cos, sin = (of_rows[:rows, None] for of_rows in turn)
        q_TNC, cached_T1C = absorbed.absorb(
            queries[:rows],
            latents[:rows],
            latent,
            lambda x_TNR: rotate(x_TNR, cos, sin, rotation.interleaved),
        )
        step = batch()
        blocks_T, offsets_T = (torch.from_numpy(at) for at in (step.blocks_T, step.offsets_T))
        cache.write_latents(cached_T1C.to(cache.keys.dtype), blocks_T, offsets_T)
        out[:rows] = absorbed.unfold(_attend(q_TNC, pattern, cache, step), latent)

    return run


def _attend(q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache, batch: Batch) -> torch.Tensor:
    """float32 [T, N, value_dim]."""
    rows = SpanRows.of(
        batch.spans_S4, batch.tables, batch.prompts_S, cache.keys.shape[2], _as_tensor
    )
    return rows.attend(q_TNH.to(cache.keys.dtype), cache, pattern).float()


def _as_tensor(numbers: Int64) -> torch.Tensor:
    return torch.from_numpy(numbers)
