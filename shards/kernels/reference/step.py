"""Sentences computed as they are spoken, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kernels.base import (
    Embedding,
    Experts,
    Gating,
    Head,
    HeadNorms,
    Latent,
    Linear,
    Norm,
    Part,
    Pattern,
    Phase,
    PositionTable,
    Rotation,
)
from shards.kernels.reference import latent as absorbed
from shards.kernels.reference.attention import SpanRows
from shards.kernels.reference.elementwise import (
    angles,
    gate,
    norm,
    norm_heads,
    rotate,
    shape_logits,
)
from shards.kernels.reference.experts import Sorted, count_tokens, expert_by_expert, route
from shards.kernels.reference.matrix import PlainMatrix
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer


class ReferenceStep:
    """`Sentences` about one batch."""

    def __init__(
        self, batch: Batch, collective: Collective, timer: PhaseTimer, device: torch.device
    ) -> None:
        self._device = device
        self._collective = collective
        self._timer = timer
        self._tokens_T = self._tensor(batch.tokens_T)
        self._positions_T = self._tensor(batch.positions_T)
        self._blocks_T = self._tensor(batch.blocks_T)
        self._offsets_T = self._tensor(batch.offsets_T)
        self._batch = batch
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: SpanRows | None = None

    def embed(
        self, embedding: Embedding[PlainMatrix], positions: PositionTable | None
    ) -> torch.Tensor:
        foreign_T = self._tokens_T < embedding.first
        foreign_T |= self._tokens_T >= embedding.first + embedding.matrix.outputs
        local_T = (self._tokens_T - embedding.first).masked_fill_(foreign_T, 0)
        x_TD = embedding.matrix.rows(local_T).masked_fill_(foreign_T[:, None], 0)
        self._timer.mark("embed")
        x_TD = self._collective.all_reduce(x_TD) * embedding.scale
        self._timer.mark("all_reduce")
        if embedding.projection is not None:
            x_TD = embedding.projection.apply(x_TD)
        if positions is not None:
            x_TD = x_TD + positions.weight[self._positions_T + positions.offset]
        x_TD = norm(x_TD, embedding.norm)
        self._timer.mark("embed")
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        before: Norm | None,
        qkv: Linear[PlainMatrix],
        pattern: Pattern,
        head_norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = linear(norm(x_TD, before), qkv)
        head_dim = joined.shape[-1] // (pattern.heads + 2 * pattern.kv_heads)
        q, k, v = torch.split(
            joined.view(len(joined), -1, head_dim),
            [pattern.heads, pattern.kv_heads, pattern.kv_heads],
            1,
        )
        if head_norms is not None:
            q, k = norm_heads(q, k, head_norms, self._collective)
        if rotation is not None:
            q, k = self._rotate(q, rotation), self._rotate(k, rotation)
        cache.write(k, v, self._blocks_T, self._offsets_T)
        return q

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        return self._attend(q_TNH, pattern, cache).flatten(1)

    def attend_latent(
        self,
        x_TD: torch.Tensor,
        before: Norm | None,
        latent: Latent[PlainMatrix],
        pattern: Pattern,
        rotation: Rotation,
        cache: LayerCache,
    ) -> torch.Tensor:
        width = cache.keys.shape[3]
        down = linear(norm(x_TD, before), latent.down)
        queries_TQ, latents_TC = down[:, :-width], down[:, -width:]
        if latent.query is not None:
            queries_TQ = linear(norm(queries_TQ, latent.query_norm), latent.query)
        q_TNC, cached_T1C = absorbed.absorb(
            queries_TQ, latents_TC, latent, lambda x_TNR: self._rotate(x_TNR, rotation)
        )
        cache.write_latents(cached_T1C, self._blocks_T, self._offsets_T)
        return absorbed.unfold(self._attend(q_TNC, pattern, cache), latent)

    def expand(
        self,
        x_TD: torch.Tensor,
        before: Norm | None,
        up: Linear[PlainMatrix],
        gating: Gating,
        token_gate: PlainMatrix | None = None,
    ) -> torch.Tensor:
        normed_TD = norm(x_TD, before)
        h_TF = gate(linear(normed_TD, up), gating)
        return h_TF if token_gate is None else h_TF * token_gate.apply(normed_TD).sigmoid()

    def mix(
        self, x_TD: torch.Tensor, before: Norm | None, experts: Experts[PlainMatrix]
    ) -> torch.Tensor:
        normed_TD = norm(x_TD, before)
        logits_TE = linear(normed_TD, Linear(experts.router, experts.router_bias))
        chosen_TX, weights_TX = route(logits_TE, experts.correction, experts.choice)
        count_tokens(chosen_TX, experts.load)
        pairs = Sorted.of(chosen_TX, weights_TX, experts.first, experts.count)

        def answer(e: int, x_PD: torch.Tensor) -> torch.Tensor:
            up_bias, down_bias = (
                None if bias is None else bias[e] for bias in (experts.up_bias, experts.down_bias)
            )
            h_PF = gate(linear(x_PD, Linear(experts.up.expert(e), up_bias)), experts.gating)
            return linear(h_PF, Linear(experts.down.expert(e), down_bias))

        y_PD = expert_by_expert(pairs.gathered(normed_TD), pairs.ends_E, x_TD.shape[1], answer)
        return pairs.summed(y_PD)

    def merge(
        self,
        x_TD: torch.Tensor,
        parts: Sequence[Part[PlainMatrix]],
        phase: Phase,
        *,
        post_norm: Norm | None = None,
        scale: float = 1.0,
        stream_norm: Norm | None = None,
    ) -> torch.Tensor:
        partial_TD = sum(
            (part.values if part.out is None else part.out.matrix.apply(part.values))
            for part in parts
        )
        assert isinstance(partial_TD, torch.Tensor)
        self._timer.mark(phase)
        sum_TD = self._collective.all_reduce(partial_TD)
        self._timer.mark("all_reduce")
        for part in parts:
            if part.out is not None and part.out.bias is not None:
                sum_TD = sum_TD + part.out.bias
        return norm(x_TD + norm(sum_TD, post_norm) * scale, stream_norm)

    def logits(self, x_SD: torch.Tensor, head: Head[PlainMatrix]) -> torch.Tensor:
        x_SD = norm(x_SD, head.norm)
        if head.projection is not None:
            x_SD = head.projection.apply(x_SD)
        logits_SV = linear(x_SD, head.linear).float()
        return shape_logits(logits_SV, head.scale, head.softcap)

    def _attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        if self._rows is None:
            batch, block_size = self._batch, cache.keys.shape[2]
            self._rows = SpanRows.of(
                batch.spans_S4, batch.tables, batch.prompts_S, block_size, self._tensor
            )
        return self._rows.attend(q_TNH, cache, pattern)

    def _rotate(self, x_TNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        found = self._turns.get(id(rotation))
        if found is None:
            found = self._turns[id(rotation)] = angles(self._positions_T, rotation)
        return rotate(x_TNH, *found, rotation.interleaved)

    def _tensor(self, values: Int64) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def linear(x_TD: torch.Tensor, layer: Linear[PlainMatrix]) -> torch.Tensor:
    y = layer.matrix.apply(x_TD)
    return y if layer.bias is None else y + layer.bias
