"""The reference's `KernelSet`, and an `Executor` that speaks every step anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards import kv_cache
from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kernels.base import Decodes, Limits, Weight
from shards.kernels.reference.matrix import PlainMatrix
from shards.kernels.reference.step import ReferenceStep
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer


class ReferenceKernels:
    """Weights, activations and cache in one dtype on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def pack(self, weights: Sequence[Weight]) -> PlainMatrix:
        return PlainMatrix.of(weights, self._dtype)

    def pack_experts(self, experts: Sequence[Sequence[Weight]]) -> PlainMatrix:
        return PlainMatrix(tuple(w for own in experts for w in own), self._dtype, len(experts))

    def vector(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device, self._dtype)

    def allocate(
        self,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> LayerCache:
        shape = (blocks, kv_heads, block_size, head_dim)
        keys = kv_cache.zeros(shape, self._dtype, self._device)
        if value_dim is not None:
            return LayerCache.of_latents(keys, value_dim)
        return LayerCache(keys, kv_cache.zeros(shape, self._dtype, self._device))

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
