"""What stays the same from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shards.batch import Batch
from shards.collectives.base import Collective
from shards.kernels.base import Decodes
from shards.kernels.cuda.attention import AttentionBackend, Geometry, StepAttention
from shards.kernels.cuda.elementwise import Elementwise
from shards.kernels.cuda.matrix import CudaMatrix
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.cuda.padding import padded, scratch_decode
from shards.kernels.cuda.step import Angles, CudaStep, Inputs
from shards.kv_cache import LayerCache
from shards.timing import PhaseTimer


@dataclass(frozen=True, slots=True)
class Epoch:
    """A decoder with its caches and its group. Block `scratch` of the caches is nobody's."""

    decoder: Decodes[CudaMatrix]
    caches: Sequence[LayerCache]
    collective: Collective
    geometry: Geometry
    scratch: int
    attention: AttentionBackend
    elementwise: Elementwise
    angles: Angles

    def step(self, inputs: Inputs, attention: StepAttention, timer: PhaseTimer) -> CudaStep:
        return CudaStep(inputs, attention, self.elementwise, self.angles, self.collective, timer)

    def mirror(self, *, fixed: bool) -> Mirror:
        return Mirror(self.geometry.device, fixed=fixed)

    def padded(self, batch: Batch, rows: int) -> Batch:
        geometry = self.geometry
        return padded(batch, rows, geometry.blocks, geometry.block_size, self.scratch)

    def scratch_decode(self, rows: int) -> Batch:
        geometry = self.geometry
        return scratch_decode(rows, geometry.blocks, geometry.block_size, self.scratch)
