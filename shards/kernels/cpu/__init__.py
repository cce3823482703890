"""The kernel set for CPUs: a rank's whole step is one compiled call.

`recorder` takes sentences down as instructions, `program` runs them; the other files are kernels
and what they are made of. Activations are float32 whatever the weights are kept in.
"""

from shards.kernels.cpu.kernels import CpuKernels

__all__ = ["CpuKernels"]
