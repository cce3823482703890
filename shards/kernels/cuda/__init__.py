"""The kernel set for NVIDIA GPUs: PyTorch's kernels and FlashInfer's, decode steps as CUDA graphs.

Nothing here imports more than torch until a set is made; see `docs/cuda.md` for what has run where.
"""

from shards.kernels.cuda.kernels import CudaKernels

__all__ = ["CudaKernels"]
