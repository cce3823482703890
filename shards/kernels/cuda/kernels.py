"""The CUDA kernel set: how weights are held, caches laid out, steps run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards import kv_cache
from shards.collectives.base import Collective
from shards.kernels.base import Decodes, Limits, Weight
from shards.kernels.cuda import float8, int4
from shards.kernels.cuda.attention import AttentionName, Geometry, choose
from shards.kernels.cuda.device import check_device
from shards.kernels.cuda.elementwise import elementwise
from shards.kernels.cuda.epoch import Epoch
from shards.kernels.cuda.executor import CudaExecutor
from shards.kernels.cuda.experts import ExpertMatrices
from shards.kernels.cuda.float8 import Float8Matrix
from shards.kernels.cuda.graphs import CudaCapture
from shards.kernels.cuda.int4 import Int4Matrix
from shards.kernels.cuda.matrix import CudaMatrix, DenseMatrix, GroupedMatrix, SideBySide
from shards.kernels.cuda.step import Angles
from shards.kv_cache import LayerCache
from shards.quantization.tensor import QuantizedTensor


class CudaKernels:
    """Activations and cache in `dtype` on `device`, "cuda" or "cuda:1".

    On "cpu" the same code computes through PyTorch alone, without graphs: for tests.

    Args:
        attention: the library to use; "auto" takes the best that can serve the model.
        quantize_to_float8: hold weights that come as floats in 8-bit floats, where their shape
            allows it.

    Raises `DeviceError` where the device is not there or cannot compute so.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        attention: AttentionName = "auto",
        quantize_to_float8: bool = False,
    ) -> None:
        check_device(device, dtype, float8=quantize_to_float8)
        self._device = device
        self._dtype = dtype
        self._attention: AttentionName = attention
        self._quantize_to_float8 = quantize_to_float8

    def pack(self, weights: Sequence[Weight]) -> CudaMatrix:
        floats = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        codes = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
        if not codes:
            return self._dense(floats[0] if len(floats) == 1 else torch.cat(floats))
        if not floats and len({weight.scheme for weight in codes}) == 1:
            return self._quantized(codes[0] if len(codes) == 1 else _joined(codes))
        return SideBySide(tuple(self.pack([weight]) for weight in weights))

    def pack_experts(self, experts: Sequence[Sequence[Weight]]) -> ExpertMatrices:
        return ExpertMatrices.of(experts, self._dtype, self._device)

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
        """One block more than asked for: the scratch block, where padding rows write."""
        shape = (blocks + 1, kv_heads, block_size, head_dim)
        keys = kv_cache.zeros(shape, self._dtype, self._device)
        if value_dim is not None:
            return LayerCache.of_latents(keys, value_dim)
        return LayerCache(keys, kv_cache.zeros(shape, self._dtype, self._device))

    def executor(
        self,
        decoder: Decodes[CudaMatrix],
        caches: Sequence[LayerCache],
        collective: Collective,
        limits: Limits,
    ) -> CudaExecutor:
        """Captures a graph for every rung of the ladder, which takes seconds.

        Raises `UnsupportedModel` where the attention library asked for cannot serve the caches.
        """
        blocks, _, block_size, _ = caches[0].keys.shape
        geometry = Geometry(
            head_dims=frozenset(cache.keys.shape[3] for cache in caches),
            block_size=block_size,
            blocks=limits.blocks,
            dtype=self._dtype,
            device=self._device,
            plain=all(pattern.is_plain for pattern in decoder.patterns)
            and not any(cache.is_latent for cache in caches),
        )
        epoch = Epoch(
            decoder,
            caches,
            collective,
            geometry,
            scratch=blocks - 1,
            attention=choose(self._attention, geometry),
            elementwise=elementwise(self._device, self._dtype),
            angles=Angles(self._device),
        )
        capture = CudaCapture(self._device) if self._device.type == "cuda" else None
        return CudaExecutor(epoch, limits, capture)

    def _dense(self, weight: torch.Tensor) -> CudaMatrix:
        if self._quantize_to_float8 and float8.fits(weight, self._dtype):
            return Float8Matrix.of(weight)
        return DenseMatrix(weight)

    def _quantized(self, weight: QuantizedTensor) -> CudaMatrix:
        if int4.fits(weight, self._dtype):
            return Int4Matrix(weight)
        return GroupedMatrix.of(weight, self._dtype)


def _joined(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Weights of one scheme, one above the other."""
    minima = [weight.minima for weight in weights if weight.minima is not None]
    return QuantizedTensor(
        weights[0].scheme,
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(minima) if minima else None,
    )
