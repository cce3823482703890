"""The mapping that the ranks of one host share: its layout, and what the driver does with it.

A leaf without torch or numba: the driver creates a segment per epoch, sends its descriptor to the
ranks over a unix socket (SCM_RIGHTS), and may abort it. It is an anonymous memfd, so no name exists
that a killed process could leave behind; the kernel frees it with the last descriptor and mapping.

    line 0                header: magic, world, slot bytes
    line 1                abort word: 0 while the group lives
    line 2 + r            rank r's counter: how many rounds it has published
    page-aligned          2 buffers x world slots of `slot_bytes`; buffer b, rank r is b * world + r

Every word is a native int64. A line is two cache lines of 64 bytes, because the adjacent-line
prefetcher (x86) and 128-byte lines (some ARM) would make neighbours share.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass

from shards.errors import CollectiveError

LINE = 128
ABORT = LINE
COUNTERS = 2 * LINE
MAX_WORLD = 1024
DEFAULT_CAPACITY = 1 << 20
_PAGE = 4096
_MAGIC = 0x68_77_73_65_67_30_30_31
_HEADER = struct.Struct("=qqq")
_WORD = struct.Struct("=q")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def slots_offset(world: int) -> int:
    """Where the first slot begins, in bytes."""
    return _round_up(COUNTERS + world * LINE, _PAGE)


def segment_size(world: int, capacity_bytes: int = DEFAULT_CAPACITY) -> int:
    """Bytes of a segment for `world` ranks that publish up to `capacity_bytes` at a time.

    Raises `CollectiveError` for a world outside 1..1024 or a capacity below 64 bytes.
    """
    if not 1 <= world <= MAX_WORLD:
        raise CollectiveError(f"world={world}: a segment holds 1 to {MAX_WORLD} ranks")
    if capacity_bytes < 64:
        raise CollectiveError(f"capacity_bytes={capacity_bytes}: a slot needs 64 bytes or more")
    return slots_offset(world) + 2 * world * _round_up(capacity_bytes, _PAGE)


def create_segment(world: int, capacity_bytes: int = DEFAULT_CAPACITY) -> int:
    """A new segment for one epoch; returns its file descriptor, which the caller closes.

    Tensors above the capacity travel in pieces. The size is sealed: no holder of the descriptor
    can truncate it under the others.
    """
    size = segment_size(world, capacity_bytes)
    fd = os.memfd_create("headwise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, _HEADER.pack(_MAGIC, world, _round_up(capacity_bytes, _PAGE)), 0)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def abort_segment(fd: int) -> None:
    """End the epoch: every rank that waits, or calls later, raises `CollectiveAborted`.

    From any process that holds the descriptor, at any time, as often as it likes.
    """
    os.pwrite(fd, _WORD.pack(1), ABORT)


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says of itself; `counters` as they stood when it was read."""

    world: int
    slot_bytes: int
    size: int
    counters: tuple[int, ...]


def read_header(fd: int) -> Header:
    """Raises `CollectiveError` where the descriptor is not that of a segment."""
    try:
        header = os.pread(fd, _HEADER.size, 0)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise CollectiveError(f"segment {fd} cannot be read: {error.strerror}") from error
    if len(header) == _HEADER.size:
        magic, world, slot_bytes = _HEADER.unpack(header)
        if magic == _MAGIC and size == segment_size(world, slot_bytes):
            lines = os.pread(fd, world * LINE, COUNTERS)
            counters = tuple(_WORD.unpack_from(lines, rank * LINE)[0] for rank in range(world))
            return Header(world, slot_bytes, size, counters)
    raise CollectiveError(f"descriptor {fd} is not a segment of this version: use create_segment()")
