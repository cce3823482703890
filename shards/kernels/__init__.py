"""Kernel sets, chosen by device."""

from __future__ import annotations

from typing import Any

import torch

from shards.kernels.base import KernelSet
from shards.quantization.choice import Quantization


def kernel_set(
    device: torch.device, dtype: torch.dtype, threads: int, quantization: Quantization = "none"
) -> KernelSet[Any]:
    """The fastest set there is for `device`; on a CPU it computes with so many threads.

    Weights that a checkpoint holds quantised ("auto") mean what they dequantise to. Who asks for
    "int8" or "int4" wants speed: on a CPU activations are then rounded to 8 bits as well.
    """
    if device.type == "cuda":
        from shards.kernels.cuda import CudaKernels

        return CudaKernels(device, dtype)
    from shards.kernels.cpu import CpuKernels

    return CpuKernels(dtype, threads, integers=quantization in ("int8", "int4"))
