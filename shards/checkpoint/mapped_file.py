"""A memory-mapped file of which only what is asked for counts as resident."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from shards.errors import CheckpointError

_RESIDENT_AT_MOST = 64 << 20


class MappedFile:
    """A read-only mapping of `path`, which must still be `size` bytes long.

    Pages of a mapping count into a process's RSS once touched. They are dropped again whenever
    some 64 MiB were, so that a rank's peak stays at its own weights; the kernel's cache keeps them
    for the other ranks of the host.
    """

    def __init__(self, path: str, size: int) -> None:
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if len(self._map) != size:
            raise CheckpointError(
                f"{path}: has {len(self._map)} bytes and had {size} when its header was read: "
                "the file was changed meanwhile; start again"
            )
        self._touched = 0

    def copy(
        self, *, offset: int, rows: int, stride: int, start: int, stop: int
    ) -> npt.NDArray[np.uint8]:
        """Bytes `start` to `stop` of each of `rows` rows that lie `stride` bytes apart from byte
        `offset` on: a contiguous array [rows, stop - start] of its own."""
        span = np.frombuffer(self._map, np.uint8, rows * stride, offset).reshape(rows, stride)
        copied = span[:, start:stop].copy()
        self._touched += span.nbytes
        if self._touched > _RESIDENT_AT_MOST:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return copied

    def close(self) -> None:
        self._map.close()
