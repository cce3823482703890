"""The kernel set in plain PyTorch, for any device: what every other set is held to."""

from shards.kernels.reference.kernels import ReferenceKernels

__all__ = ["ReferenceKernels"]
