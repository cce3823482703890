"""Sentences computed as they are spoken, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from shards import kv_cache
from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kernels.base import (
    Activation,
    Decodes,
    Embedding,
    Limits,
    Linear,
    Norm,
    Pattern,
    PositionTable,
    Rotation,
    Weight,
)
from shards.kernels.reference.attention import DecodeRows, PrefillRows, decode, prefill
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """Weights [outputs, inputs] as they came; quantised ones are widened at every use."""

    weights: tuple[Weight, ...]
    dtype: torch.dtype

    @property
    def outputs(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def apply(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x W^T, [T, outputs]."""
        return torch.cat([F.linear(x_TD, weight) for weight in self._wide()], -1)

    def rows(self, at: torch.Tensor) -> torch.Tensor:
        """The weights' rows `at`."""
        (weight,) = self._wide()
        return F.embedding(at, weight)

    def _wide(self) -> list[torch.Tensor]:
        return [
            weight if isinstance(weight, torch.Tensor) else weight.dequantize(self.dtype)
            for weight in self.weights
        ]


class ReferenceKernels:
    """Weights, activations and cache in one dtype on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def pack(self, weights: Sequence[Weight]) -> PlainMatrix:
        if len(weights) > 1 and all(isinstance(weight, torch.Tensor) for weight in weights):
            weights = [torch.cat([w for w in weights if isinstance(w, torch.Tensor)])]
        return PlainMatrix(tuple(weights), self._dtype)

    def vector(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def allocate(self, blocks: int, kv_heads: int, block_size: int, head_dim: int) -> LayerCache:
        shape = (blocks, kv_heads, block_size, head_dim)
        keys, values = (kv_cache.zeros(shape, self._dtype, self._device) for _ in range(2))
        return LayerCache(keys, values)

    def executor(
        self,
        decoder: Decodes[PlainMatrix],
        caches: Sequence[LayerCache],
        collective: Collective,
        limits: Limits,  # a step of any size is computed as it comes
    ) -> EagerExecutor:
        return EagerExecutor(decoder, caches, collective, self._device)


class EagerExecutor:
    """Speaks every step anew."""

    def __init__(
        self,
        decoder: Decodes[PlainMatrix],
        caches: Sequence[LayerCache],
        collective: Collective,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._caches = caches
        self._collective = collective
        self._device = device
        self._step: ReferenceStep | None = None
        self._hidden_TD = torch.empty(0)

    def forward(self, batch: Batch, timer: PhaseTimer) -> None:
        self._step = ReferenceStep(batch, self._collective, timer, self._device)
        self._hidden_TD = self._decoder.hidden(self._step, self._caches)

    def logits(self, rows_S: Int64, timer: PhaseTimer) -> torch.Tensor:
        if self._step is None:
            raise RuntimeError("asked for logits before a step")
        rows = torch.from_numpy(rows_S).to(self._device)
        logits_SV = self._decoder.logits(self._step, self._hidden_TD[rows])
        timer.mark("output")
        return logits_SV


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
        self._decode: DecodeRows | None = None
        self._prefills: tuple[PrefillRows, ...] = ()

    def embed(
        self, embedding: Embedding[PlainMatrix], positions: PositionTable | None
    ) -> torch.Tensor:
        foreign_T = self._tokens_T < embedding.first
        foreign_T |= self._tokens_T >= embedding.first + embedding.matrix.outputs
        local_T = (self._tokens_T - embedding.first).masked_fill_(foreign_T, 0)
        x_TD = embedding.matrix.rows(local_T).masked_fill_(foreign_T[:, None], 0)
        self._timer.mark("embed")
        x_TD = self._collective.all_reduce(x_TD)
        self._timer.mark("all_reduce")
        if positions is not None:
            x_TD = x_TD + positions.weight[self._positions_T + positions.offset]
        self._timer.mark("embed")
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        qkv: Linear[PlainMatrix],
        pattern: Pattern,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = _linear(_norm(x_TD, norm), qkv)
        head_dim = joined.shape[-1] // (pattern.heads + 2 * pattern.kv_heads)
        q, k, v = torch.split(
            joined.view(len(joined), -1, head_dim),
            [pattern.heads, pattern.kv_heads, pattern.kv_heads],
            1,
        )
        if rotation is not None:
            q, k = self._rotate(q, rotation), self._rotate(k, rotation)
        cache.write(k, v, self._blocks_T, self._offsets_T)
        return q

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        if self._decode is None and not self._prefills:
            self._read_spans(cache.keys.shape[2])
        rows = self._decode
        if rows is not None and not self._prefills:
            return decode(q_TNH, cache, rows, pattern).flatten(1)
        out_TNH = torch.empty_like(q_TNH)
        if rows is not None:
            out_TNH[rows.rows_S] = decode(q_TNH[rows.rows_S], cache, rows, pattern)
        for chunk in self._prefills:
            span = slice(chunk.start, chunk.stop)
            out_TNH[span] = prefill(q_TNH[span], cache, chunk, pattern)
        return out_TNH.flatten(1)

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        up: Linear[PlainMatrix],
        activation: Activation,
        gated: bool,
    ) -> torch.Tensor:
        h = _linear(_norm(x_TD, norm), up)
        if not gated:
            return _ACTIVATIONS[activation](h)
        gate_TF, up_TF = h.chunk(2, -1)
        return _ACTIVATIONS[activation](gate_TF) * up_TF

    def merge(
        self,
        x_TD: torch.Tensor,
        y_TN: torch.Tensor,
        out: Linear[PlainMatrix],
        phase: Literal["attention", "ffn"],
    ) -> torch.Tensor:
        partial_TD = out.matrix.apply(y_TN)
        self._timer.mark(phase)
        sum_TD = self._collective.all_reduce(partial_TD)
        self._timer.mark("all_reduce")
        return x_TD + (sum_TD if out.bias is None else sum_TD + out.bias)

    def logits(self, x_SD: torch.Tensor, norm: Norm, output: PlainMatrix) -> torch.Tensor:
        return output.apply(_norm(x_SD, norm)).float()

    def _read_spans(self, block_size: int) -> None:
        """Single rows are computed together, longer spans one by one."""
        spans_S4, tables = self._batch.spans_S4, self._batch.tables
        single = spans_S4[:, 1] == 1
        if single.any():
            rows = spans_S4[single]
            width = -(-int(rows[:, 2].max()) // block_size)
            self._decode = DecodeRows(
                self._tensor(rows[:, 0]),
                self._tensor(tables[rows[:, 3], :width]),
                self._tensor(rows[:, 2]),
            )
        self._prefills = tuple(
            PrefillRows(
                first,
                first + count,
                self._tensor(tables[table, : -(-context // block_size)]),
                context,
            )
            for first, count, context, table in spans_S4[~single].tolist()
        )

    def _rotate(self, x_TNH: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        cos, sin = self._angles(rotation, x_TNH.dtype)
        dim = 2 * rotation.inverse.numel()
        turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
        if rotation.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        parts = (a * cos - b * sin, b * cos + a * sin)
        turned = (
            torch.stack(parts, -1).flatten(-2) if rotation.interleaved else torch.cat(parts, -1)
        )
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    def _angles(self, rotation: Rotation, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, dim / 2], computed once a step."""
        found = self._turns.get(id(rotation))
        if found is None:
            inverse = rotation.inverse.to(self._device)
            angle = self._positions_T[:, None, None].float() * inverse
            cos, sin = angle.cos() * rotation.factor, angle.sin() * rotation.factor
            found = self._turns[id(rotation)] = cos.to(dtype), sin.to(dtype)
        return found

    def _tensor(self, values: Int64) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _linear(x_TD: torch.Tensor, linear: Linear[PlainMatrix]) -> torch.Tensor:
    y = linear.matrix.apply(x_TD)
    return y if linear.bias is None else y + linear.bias


def _norm(x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
    shape = norm.weight.shape
    if norm.kind == "layer":
        return F.layer_norm(x_TD, shape, norm.weight, norm.bias, norm.eps)
    normed_TD = norm.weight * F.rms_norm(x_TD.float(), shape, None, norm.eps).to(x_TD.dtype)
    return normed_TD if norm.bias is None else normed_TD + norm.bias
