"""The CPU's `KernelSet`, and its `Executor`: two recorded programs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shards import kv_cache
from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kernels.base import Decodes, Limits, Weight
from shards.kernels.cpu import matrix
from shards.kernels.cpu.arena import Arena
from shards.kernels.cpu.inputs import Inputs
from shards.kernels.cpu.kernel import Header
from shards.kernels.cpu.matrix import CpuMatrix
from shards.kernels.cpu.paged_cache import allocate_cache
from shards.kernels.cpu.program import Program
from shards.kernels.cpu.recorder import Recorder
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer


class CpuKernels:
    """Weights and cache in `dtype` or quantised, activations in float32, `threads` threads.

    With `integers`, activations that meet quantised weights are rounded to 8 bits, a scale for each
    32 of them, and multiplied as integers: faster, and not quite the dequantised weights' answer.
    """

    def __init__(self, dtype: torch.dtype, threads: int, *, integers: bool = False) -> None:
        self._dtype = dtype
        self._threads = threads
        self._integers = integers
        self._arena = Arena()

    def pack(self, weights: Sequence[Weight]) -> CpuMatrix:
        return matrix.pack(weights, self._arena.allocate)

    def pack_experts(self, experts: Sequence[Sequence[Weight]]) -> CpuMatrix:
        return matrix.pack_experts(experts, self._arena.allocate)

    def vector(self, value: torch.Tensor) -> torch.Tensor:
        return value.float().contiguous()

    def allocate(
        self,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> LayerCache:
        if value_dim is None:
            return allocate_cache(blocks, kv_heads, block_size, head_dim, self._dtype)
        shape = (blocks, kv_heads, block_size, head_dim)
        keys = kv_cache.zeros(shape, self._dtype, torch.device("cpu"))
        return LayerCache.of_latents(keys, value_dim)

    def executor(
        self,
        decoder: Decodes[CpuMatrix],
        caches: Sequence[LayerCache],
        collective: Collective,
        limits: Limits,
    ) -> ProgramExecutor:
        # The threads are the program's from here on: PyTorch's own would spin beside them.
        torch.set_num_threads(1)
        return ProgramExecutor(
            decoder, caches, collective, limits, self._threads, integers=self._integers
        )


class ProgramExecutor:
    """Fills the buffers that the programs read, and runs them."""

    def __init__(
        self,
        decoder: Decodes[CpuMatrix],
        caches: Sequence[LayerCache],
        collective: Collective,
        limits: Limits,
        threads: int,
        *,
        integers: bool,
    ) -> None:
        self._inputs = Inputs(limits)
        self._block_size = caches[0].keys.shape[2]
        forward = Recorder(self._inputs, limits, collective, threads, integers=integers)
        hidden_TD = decoder.hidden(forward, caches)
        self._forward = Program(forward.steps, threads, forward.check)
        head = Recorder(self._inputs, limits, collective, threads, integers=integers)
        self._logits_SV = decoder.logits(head, hidden_TD)
        self._head = Program(head.steps, threads, head.check)

    def forward(self, batch: Batch, timer: PhaseTimer) -> None:
        rows, spans = len(batch.tokens_T), len(batch.spans_S4)
        inputs = self._inputs
        inputs.tokens[:rows] = batch.tokens_T
        inputs.positions[:rows] = batch.positions_T
        inputs.blocks[:rows] = batch.blocks_T
        inputs.offsets[:rows] = batch.offsets_T
        inputs.spans[:spans] = batch.spans_S4
        inputs.spans[:spans, 3] = np.arange(spans)
        width = -(-int(batch.spans_S4[:, 2].max()) // self._block_size)
        inputs.tables[:spans, :width] = batch.tables[batch.spans_S4[:, 3], :width]
        inputs.batch = batch
        header = self._forward.header
        header[Header.ROWS] = rows
        header[Header.SPANS] = spans
        header[Header.TABLE] = inputs.tables.shape[1]
        self._forward.run(timer)

    def logits(self, rows_S: Int64, timer: PhaseTimer) -> torch.Tensor:
        sampled = len(rows_S)
        self._inputs.sampled[:sampled] = rows_S
        self._head.header[Header.SAMPLED] = sampled
        self._head.run(timer)
        return self._logits_SV[:sampled]
