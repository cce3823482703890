"""The header of a GGUF file: metadata and tensors.

Read here rather than through gguf.GGUFReader, which builds an array for every token of the
vocabulary (2 s for one of 49k, where this takes 0.1 s) and maps truncated files without complaint.
The layout: magic, version, counts, key/value pairs, tensor infos, padding to the alignment, data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from shards.checkpoint.checkpoint import Checkpoint, TensorInfo
from shards.errors import CheckpointError, UnsupportedModel

_VERSIONS = (2, 3)
_AXES_AT_MOST = 4
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_U32 = _SCALARS[GGUFValueType.UINT32]
_U64 = _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """`metadata` holds every key but the tokenizer's arrays; `has_tokenizer` says if those are
    there."""

    metadata: Mapping[str, Any]
    has_tokenizer: bool
    checkpoint: Checkpoint


def open_gguf(path: Path) -> GGUFFile:
    """Raises `CheckpointError` (not a GGUF, truncated, corrupt: where and what) or
    `UnsupportedModel` (big-endian, one of several files)."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a GGUF file: it is empty") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    with mapped:
        return _Header(path, mapped).read()


class _Header:
    """A cursor over the header; every read is held against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> GGUFFile:
        self._check_start()
        tensor_count, pair_count = self._scalar(_U64), self._scalar(_U64)
        metadata: dict[str, Any] = {}
        has_tokenizer = False
        for _ in range(pair_count):
            key = self._string()
            kind = self._value_type()
            if kind is GGUFValueType.ARRAY and key.startswith("tokenizer."):
                self._array(keep=False)
                has_tokenizer = True
            else:
                metadata[key] = self._value(kind)
        if metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModel(
                f"{self._path}: one of {metadata['split.count']} files of a split GGUF: merge them "
                "into one (llama.cpp's gguf-split --merge) and give that"
            )
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._corrupt(f"general.alignment is {alignment!r}")
        infos = [self._tensor_info() for _ in range(tensor_count)]
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind_id, offset in infos:
            if name in tensors:
                raise self._corrupt(f"tensor {name} is listed twice")
            tensors[name] = self._tensor(name, shape, kind_id, begin + offset)
        checkpoint = Checkpoint(tensors, {str(self._path): len(self._data)})
        return GGUFFile(metadata, has_tokenizer, checkpoint)

    def _check_start(self) -> None:
        if self._data[:4] != b"GGUF":
            raise CheckpointError(
                f"{self._path}: not a GGUF file: it begins with {self._data[:4]!r}"
            )
        self._at = 4
        version = self._scalar(_U32)
        if version & 0xFFFF == 0:
            raise UnsupportedModel(f"{self._path}: a big-endian GGUF: convert the model again")
        if version not in _VERSIONS:
            raise UnsupportedModel(f"{self._path}: GGUF version {version}: 2 and 3 are known")

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        axes = self._scalar(_U32)
        if not 1 <= axes <= _AXES_AT_MOST:
            raise self._corrupt(f"tensor {name} has {axes} axes")
        # The file lists the fastest axis first.
        shape = tuple(self._scalar(_U64) for _ in range(axes))[::-1]
        return name, shape, self._scalar(_U32), self._scalar(_U64)

    def _tensor(self, name: str, shape: tuple[int, ...], kind_id: int, offset: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError as error:
            raise UnsupportedModel(
                f"{self._path}: tensor {name} has type {kind_id}, which gguf does not know"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._corrupt(
                f"tensor {name}, {kind.name} {list(shape)}, has rows that are not whole blocks "
                f"of {block}"
            )
        nbytes = prod(shape) // block * block_bytes
        if offset + nbytes > len(self._data):
            raise CheckpointError(
                f"{self._path}: truncated: tensor {name} ends at byte {offset + nbytes} and the "
                f"file at {len(self._data)}: fetch it again"
            )
        return TensorInfo(shape, kind.name, str(self._path), offset, nbytes)

    def _value_type(self) -> GGUFValueType:
        number = self._scalar(_U32)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self._corrupt(f"value type {number} is unknown") from error

    def _value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is GGUFValueType.ARRAY:
            return self._array(keep=True)
        return self._scalar(_SCALARS[kind])

    def _array(self, *, keep: bool) -> list[Any]:
        """The elements; an empty list, past them, unless `keep`."""
        kind, count = self._value_type(), self._scalar(_U64)
        if kind is GGUFValueType.ARRAY:
            raise self._corrupt("an array of arrays")
        if kind is GGUFValueType.STRING:
            if keep:
                return [self._string() for _ in range(count)]
            for _ in range(count):
                self._skip(self._scalar(_U64))
            return []
        start = self._skip(_SCALARS[kind].size * count)
        if not keep:
            return []
        return [value for (value,) in _SCALARS[kind].iter_unpack(self._data[start : self._at])]

    def _string(self) -> str:
        start = self._skip(self._scalar(_U64))
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a name that is not UTF-8: {error.reason}") from error

    def _scalar(self, form: struct.Struct) -> Any:
        start = self._skip(form.size)
        return form.unpack_from(self._data, start)[0]

    def _skip(self, count: int) -> int:
        """Move past `count` bytes and return where they start."""
        start = self._at
        if start + count > len(self._data):
            raise CheckpointError(
                f"{self._path}: truncated: its header goes on at byte {start + count} and the file "
                f"ends at {len(self._data)}: fetch it again"
            )
        self._at = start + count
        return start

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: corrupt header near byte {self._at}: {what}")
