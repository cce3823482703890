"""Sentences on a GPU, eagerly or while a graph takes them down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shards.batch import Batch
from shards.collectives.base import Collective
from shards.kernels.base import (
    Activation,
    Embedding,
    Linear,
    Norm,
    Pattern,
    Phase,
    PositionTable,
    Rotation,
)
from shards.kernels.cuda.attention import StepAttention
from shards.kernels.cuda.elementwise import Elementwise
from shards.kernels.cuda.matrix import CudaMatrix
from shards.kernels.cuda.mirror import Mirror
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
        if positions is not None:
            x_TD += positions.weight[self._inputs.positions_T + positions.offset]
        self._timer.mark("embed")
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        qkv: Linear[CudaMatrix],
        pattern: Pattern,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = _linear(self._elementwise.norm(x_TD, norm), qkv)
        head_dim = joined.shape[1] // (pattern.heads + 2 * pattern.kv_heads)
        q_TNH, k_TKH, v_TKH = joined.view(len(joined), -1, head_dim).split(  # type: ignore[no-untyped-call]
            (pattern.heads, pattern.kv_heads, pattern.kv_heads), 1
        )
        if rotation is not None:
            turns = self._turns.get(id(rotation))
            if turns is None:
                turns = self._angles.of(rotation, self._inputs.positions_T)
                self._turns[id(rotation)] = turns
            q_TNH, k_TKH = self._elementwise.rotate(q_TNH, k_TKH, turns, rotation.interleaved)
        cache.write(k_TKH, v_TKH, self._inputs.blocks_T, self._inputs.offsets_T)
        return q_TNH

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        return self._attention.attend(q_TNH, pattern, cache).flatten(1)

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        up: Linear[CudaMatrix],
        activation: Activation,
        gated: bool,
    ) -> torch.Tensor:
        h = _linear(self._elementwise.norm(x_TD, norm), up)
        return self._elementwise.activate(h, activation, gated)

    def merge(
        self, x_TD: torch.Tensor, y_TN: torch.Tensor, out: Linear[CudaMatrix], phase: Phase
    ) -> torch.Tensor:
        partial_TD = out.matrix.apply(y_TN).contiguous()
        self._timer.mark(phase)
        sum_TD = self._collective.all_reduce(partial_TD)
        self._timer.mark("all_reduce")
        if out.bias is not None:
            sum_TD += out.bias
        return x_TD.add_(sum_TD)

    def logits(self, x_SD: torch.Tensor, norm: Norm, output: CudaMatrix) -> torch.Tensor:
        return output.apply(self._elementwise.norm(x_SD, norm)).float()


def _linear(x_TD: torch.Tensor, linear: Linear[CudaMatrix]) -> torch.Tensor:
    y = linear.matrix.apply(x_TD)
    return y if linear.bias is None else y + linear.bias
