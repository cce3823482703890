"""Kernel sets, chosen by device."""

from __future__ import annotations

import platform
from typing import Any

import torch

from shards.kernels.base import KernelSet


def kernel_set(device: torch.device, dtype: torch.dtype, threads: int) -> KernelSet[Any]:
    """The fastest set there is for `device`; on a CPU it computes with so many threads."""
    if device.type == "cuda":
        from shards.kernels.cuda import CudaKernels

        return CudaKernels(device, dtype)
    if not _compiles_well():
        from shards.kernels.reference import ReferenceKernels

        return ReferenceKernels(device, dtype)
    from shards.kernels.cpu import CpuKernels

    return CpuKernels(dtype, threads)


def _compiles_well() -> bool:
    """Whether LLVM has instructions for 16-bit floats here; older x86 processors lack them."""
    from shards.kernels.cpu.simd import FEATURES

    return platform.machine() != "x86_64" or {"avx2", "fma", "f16c"} <= FEATURES
