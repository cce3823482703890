"""Kernel sets, chosen by device."""

from __future__ import annotations

from typing import Any

import torch

from shards.kernels.base import KernelSet


def kernel_set(device: torch.device, dtype: torch.dtype, threads: int) -> KernelSet[Any]:
    """The fastest set there is for `device`; on a CPU it computes with so many threads."""
    if device.type == "cuda":
        from shards.kernels.cuda import CudaKernels

        return CudaKernels(device, dtype)
    from shards.kernels.cpu import CpuKernels

    return CpuKernels(dtype, threads)
