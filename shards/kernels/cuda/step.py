"""Sentences on a GPU, eagerly or while a graph takes them down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shards.batch import Batch
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
from shards.kernels.cuda.attention import StepAttention
from shards.kernels.cuda.elementwise import Elementwise
from shards.kernels.cuda.experts import mix
from shards.kernels.cuda.matrix import CudaMatrix
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.reference import latent as absorbed
from shards.kernels.reference.elementwise import gate, norm_heads, rotate, shape_logits
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step's tokens, their positions, and where their keys and values go; int64 [T] each."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    blocks_T: torch.Tensor
    offsets_T: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, mirror: Mirror) -> Inputs:
        """One copy to the device for all four."""
        arrays = (batch.tokens_T, batch.positions_T, batch.blocks_T, batch.offsets_T)
        return cls(*mirror.put("inputs", np.stack(arrays)).unbind())


class Angles:
    """Cosines and sines of a step's positions; the frequencies stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By identity: a dataclass of tensors has no equality. The rotation is held as well, so
        # that nothing else can take its id.
        self._inverse: dict[int, tuple[Rotation, torch.Tensor]] = {}

    def of(self, rotation: Rotation, positions_T: torch.Tensor) -> torch.Tensor:
        """float32 [T, dim]: cosines, then sines."""
        found = self._inverse.get(id(rotation))
        if found is None:
            found = self._inverse[id(rotation)] = rotation, rotation.inverse.to(self._device)
        angle = positions_T[:, None].float() * found[1]
        return torch.cat((angle.cos(), angle.sin()), -1) * rotation.factor


class CudaStep:
    """`Sentences` about the inputs of one step, its attention planned before."""

    def __init__(
        self,
        inputs: Inputs,
        attention: StepAttention,
        elementwise: Elementwise,
        angles: Angles,
        collective: Collective,
        timer: PhaseTimer,
    ) -> None:
        self._inputs = inputs
        self._attention = attention
        self._elementwise = elementwise
        self._angles = angles
        self._collective = collective
        self._timer = timer
        self._turns: dict[int, torch.Tensor] = {}

    def embed(
        self, embedding: Embedding[CudaMatrix], positions: PositionTable | None
    ) -> torch.Tensor:
        local_T = self._inputs.tokens_T - embedding.first
        foreign_T = (local_T < 0) | (local_T >= embedding.matrix.outputs)
        x_TD = embedding.matrix.rows(local_T.masked_fill(foreign_T, 0))
        x_TD = x_TD.masked_fill(foreign_T[:, None], 0)
        self._timer.mark("embed")
        x_TD = self._collective.all_reduce(x_TD)
        self._timer.mark("all_reduce")
        if embedding.scale != 1.0:
            x_TD *= embedding.scale
        if embedding.projection is not None:
            x_TD = embedding.projection.apply(x_TD)
        if positions is not None:
            x_TD += positions.weight[self._inputs.positions_T + positions.offset]
        x_TD = self._normed(x_TD, embedding.norm)
        self._timer.mark("embed")
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        qkv: Linear[CudaMatrix],
        pattern: Pattern,
        head_norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = _linear(self._normed(x_TD, norm), qkv)
        head_dim = joined.shape[1] // (pattern.heads + 2 * pattern.kv_heads)
        q_TNH, k_TKH, v_TKH = joined.view(len(joined), -1, head_dim).split(  # type: ignore[no-untyped-call]
            (pattern.heads, pattern.kv_heads, pattern.kv_heads), 1
        )
        if head_norms is not None:
            q_TNH, k_TKH = norm_heads(q_TNH, k_TKH, head_norms, self._collective)
        if rotation is not None:
            turns = self._turn(rotation)
            q_TNH, k_TKH = self._elementwise.rotate(q_TNH, k_TKH, turns, rotation.interleaved)
        cache.write(k_TKH, v_TKH, self._inputs.blocks_T, self._inputs.offsets_T)
        return q_TNH

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        return self._attention.attend(q_TNH, pattern, cache).flatten(1)

    def attend_latent(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        latent: Latent[CudaMatrix],
        pattern: Pattern,
        rotation: Rotation,
        cache: LayerCache,
    ) -> torch.Tensor:
        width = cache.keys.shape[3]
        down = _linear(self._normed(x_TD, norm), latent.down)
        queries_TQ, latents_TC = down[:, :-width], down[:, -width:]
        if latent.query is not None:
            through = self._normed(queries_TQ.contiguous(), latent.query_norm)
            queries_TQ = _linear(through, latent.query)
        cos, sin = self._turn(rotation)[:, None].chunk(2, -1)
        q_TNC, cached_T1C = absorbed.absorb(
            queries_TQ,
            latents_TC,
            latent,
            lambda x_TNR: rotate(x_TNR, cos, sin, rotation.interleaved),
        )
        cache.write_latents(cached_T1C, self._inputs.blocks_T, self._inputs.offsets_T)
        return absorbed.unfold(self._attention.attend(q_TNC, pattern, cache), latent)

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        up: Linear[CudaMatrix],
        gating: Gating,
        token_gate: CudaMatrix | None = None,
    ) -> torch.Tensor:
        normed_TD = self._normed(x_TD, norm)
        h = _linear(normed_TD, up)
        if gating.clamp is None:
            h = self._elementwise.activate(h, gating.activation, gating.gated)
        else:
            h = gate(h, gating)
        return h if token_gate is None else h * token_gate.apply(normed_TD).sigmoid()

    def mix(
        self, x_TD: torch.Tensor, norm: Norm | None, experts: Experts[CudaMatrix]
    ) -> torch.Tensor:
        normed_TD = self._normed(x_TD, norm)
        logits_TE = _linear(normed_TD, Linear(experts.router, experts.router_bias))
        return mix(normed_TD, logits_TE, experts)

    def merge(
        self,
        x_TD: torch.Tensor,
        parts: Sequence[Part[CudaMatrix]],
        phase: Phase,
        *,
        post_norm: Norm | None = None,
        scale: float = 1.0,
        stream_norm: Norm | None = None,
    ) -> torch.Tensor:
        first, *others = (
            part.values if part.out is None else part.out.matrix.apply(part.values)
            for part in parts
        )
        partial_TD = sum(others, first).contiguous()
        self._timer.mark(phase)
        sum_TD = self._collective.all_reduce(partial_TD)
        self._timer.mark("all_reduce")
        for part in parts:
            if part.out is not None and part.out.bias is not None:
                sum_TD += part.out.bias
        x_TD = x_TD.add_(self._normed(sum_TD, post_norm), alpha=scale)
        return self._normed(x_TD, stream_norm)

    def logits(self, x_SD: torch.Tensor, head: Head[CudaMatrix]) -> torch.Tensor:
        x_SD = self._normed(x_SD, head.norm)
        if head.projection is not None:
            x_SD = head.projection.apply(x_SD)
        logits_SV = _linear(x_SD, head.linear).float()
        return shape_logits(logits_SV, head.scale, head.softcap)

    def _normed(self, x_TD: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return x_TD if norm is None else self._elementwise.norm(x_TD, norm)

    def _turn(self, rotation: Rotation) -> torch.Tensor:
        """The step's angles, computed once for all layers: see `Angles.of`."""
        turns = self._turns.get(id(rotation))
        if turns is None:
            turns = self._angles.of(rotation, self._inputs.positions_T)
            self._turns[id(rotation)] = turns
        return turns


def _linear(x_TD: torch.Tensor, linear: Linear[CudaMatrix]) -> torch.Tensor:
    y = linear.matrix.apply(x_TD)
    return y if linear.bias is None else y + linear.bias
