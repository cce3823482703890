"""Memory for weights, in huge pages where the host gives them.

A decode step reads every weight once; with 4 KiB pages it would also walk the page tables of every
4 KiB of them, a tenth of the step and more.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch

_HUGE = 2 << 20
_CHUNK = 32 << 20
_LINE = 64


class Arena:
    """Hands out memory and never takes it back: it lives as long as a tensor in it does."""

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def allocate(self, size: int) -> torch.Tensor:
        """uint8 [size], zero, on a cache line's border."""
        start = -(-self._used // _LINE) * _LINE
        if start + size > len(self._chunk):
            self._chunk, start = _map(max(size, _CHUNK)), 0
        self._used = start + size
        return torch.from_numpy(self._chunk[start : self._used])


def _map(size: int) -> np.ndarray:
    mapping = mmap.mmap(-1, size + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    first = -whole.ctypes.data % _HUGE
    return whole[first : first + size]
