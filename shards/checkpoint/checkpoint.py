"""A checkpoint as an index of where each tensor lies, whatever the format of its files.

safetensors and GGUF differ in their headers alone: behind them both hold row-major tensors, so one
reader serves both. Nothing heavy is imported before the first `read`: `headwise plan` needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.layout import Range

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from shards.checkpoint.mapped_file import MappedFile

# Elements and bytes of one block along the last axis, for every dtype that `read` decodes.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "U8": (1, 1),
    "F8_E4M3": (1, 1),
    "F8_E8M0": (1, 1),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "MXFP4": (32, 17),
}


@dataclass(frozen=True, slots=True)
class Scales:
    """What the elements of a matrix are multiplied with: those of a block of `rows` x `columns`
    share an element of the tensor at `info`, [blocks down, blocks across]."""

    info: TensorInfo
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint: `nbytes` bytes at byte `offset` of `file`, row-major.

    `dtype` is the file format's own name; `read` decodes those in `BLOCKS`, and applies the
    `scales` where a matrix has some.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int
    scales: Scales | None = None


class Checkpoint:
    """The tensors of a checkpoint, read in windows.

    `tensors` is the index, `sizes` the size in bytes of each file at the time it was made. Cheap to
    pickle (the index alone) and opened lazily in each process. Not for several threads.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], sizes: Mapping[str, int]) -> None:
        self.tensors = tensors
        self._sizes = sizes
        self._files: dict[str, MappedFile] = {}

    def with_tensors(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """Another index of the same files."""
        return Checkpoint(tensors, self._sizes)

    def read(self, name: str, window: tuple[Range, ...]) -> torch.Tensor:
        """The elements of tensor `name` within `window`, one range per axis (one or two).

        The result owns its memory and has the tensor's own dtype, float32 where that is quantised
        or scaled.
        Beside it, no more is held than the window in the file's encoding, widened to whole blocks.
        Raises `CheckpointError` where a file is gone or has changed since the index was made.
        """
        from shards.checkpoint.decode import decode

        info = self.tensors[name]
        columns = window[-1]
        block, _ = BLOCKS[info.dtype]
        first = columns.start // block * block
        encoded = self.read_blocks(
            info, window[:-1], Range(first, -(-columns.stop // block) * block)
        )
        values = decode(encoded, info.dtype)[:, columns.start - first : columns.stop - first]
        if info.scales is not None:
            values = values.float() * self._factors(info.scales, window[0], columns)
        return values if len(window) == 2 else values[0]

    def _factors(self, scales: Scales, rows: Range, columns: Range) -> torch.Tensor:
        """float32 [rows, columns] of a window, whose borders may lie within a block."""
        from torch import arange

        from shards.checkpoint.decode import decode

        down = Range(rows.start // scales.rows, -(-rows.stop // scales.rows))
        across = Range(columns.start // scales.columns, -(-columns.stop // scales.columns))
        encoded = self.read_blocks(scales.info, (down,), across)
        of_blocks = decode(encoded, scales.info.dtype).float()
        of_rows = of_blocks[arange(rows.start, rows.stop) // scales.rows - down.start]
        return of_rows[:, arange(columns.start, columns.stop) // scales.columns - across.start]

    def floats(self, name: str) -> tuple[float, ...]:
        """A one-dimensional F32 tensor as numbers, without torch; for what decides a spec."""
        info = self.tensors[name]
        encoded = self.read_blocks(info, (), Range(0, info.shape[0]))
        return tuple(encoded.view("<f4")[0].tolist())

    def close(self) -> None:
        """Unmap the files; the next `read` opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_blocks(
        self, info: TensorInfo, rows: tuple[Range, ...], columns: Range
    ) -> npt.NDArray[np.uint8]:
        """Whole blocks, still encoded: [rows, bytes]; a vector is one row."""
        from shards.checkpoint.mapped_file import MappedFile

        if info.file not in self._files:
            self._files[info.file] = MappedFile(info.file, self._sizes[info.file])
        block, nbytes = BLOCKS[info.dtype]
        taken = rows[0] if rows else Range(0, 1)
        stride = info.shape[-1] // block * nbytes
        return self._files[info.file].copy(
            offset=info.offset + taken.start * stride,
            rows=len(taken),
            stride=stride,
            start=columns.start // block * nbytes,
            stop=columns.stop // block * nbytes,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}
