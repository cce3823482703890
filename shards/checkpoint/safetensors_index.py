"""The tensors of a folder of safetensors files, from their headers alone.

The header is read here rather than through the safetensors package, whose file handle neither
pickles nor gives pages back, and whose errors do not say which tensor a truncated file cuts.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from shards.checkpoint.checkpoint import Checkpoint, TensorInfo
from shards.errors import CheckpointError

INDEX = "model.safetensors.index.json"

_LENGTH = struct.Struct("<Q")
_HEADER_AT_MOST = 100 << 20  # the format's own limit
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_safetensors(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`: one safetensors file, or several with their index.

    Raises `CheckpointError` naming file, what is wrong and where.
    """
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    expected = _weight_map(folder)
    files = sorted(set(expected.values())) if expected else [_only_file(folder)]
    for name in files:
        path = folder / name
        found = read_header(path)
        sizes[str(path)] = path.stat().st_size
        tensors |= {k: v for k, v in found.items() if not expected or expected.get(k) == name}
    absent = [name for name in expected if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX}: says that {absent[0]} is in {expected[absent[0]]}, which does not "
            f"hold it ({len(absent)} such tensors): fetch the checkpoint again"
        )
    return Checkpoint(tensors, sizes)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises `CheckpointError` where they do not fit it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                raise CheckpointError(f"{path}: not a safetensors file: it has {size} bytes only")
            (length,) = _LENGTH.unpack(start)
            if length > _HEADER_AT_MOST:
                raise CheckpointError(f"{path}: not a safetensors file: it begins with {start!r}")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(header) < length:
        raise CheckpointError(
            f"{path}: truncated: its header ends at byte {_LENGTH.size + length} and the file at "
            f"{size}: fetch it again"
        )
    try:
        entries = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt header of {length} bytes: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: corrupt header: a JSON object is needed")
    entries.pop("__metadata__", None)
    begin = _LENGTH.size + length
    return {name: _tensor(path, size, begin, name, entry) for name, entry in entries.items()}


def _tensor(path: Path, size: int, begin: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if not whole or not isinstance(dtype, str):
            raise ValueError(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt header: tensor {name} is {entry!r}") from error
    nbytes = prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if stop - start != nbytes and dtype in _ITEM_BYTES:
        raise CheckpointError(
            f"{path}: corrupt header: tensor {name}, {dtype} {list(shape)}, needs {nbytes} bytes "
            f"and is given {stop - start}"
        )
    if begin + stop > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {begin + stop} and the file at {size}: "
            "fetch it again"
        )
    return TensorInfo(shape, dtype, str(path), begin + start, stop - start)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty where the folder has no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: corrupt: an object with weight_map is needed: {error}"
        ) from error
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names {file!r}: a file name of this folder is needed")
        if not (folder / file).is_file():
            raise CheckpointError(f"{path}: names {file}, which is missing: fetch it again")
    return files


def _only_file(folder: Path) -> str:
    if (folder / "model.safetensors").is_file():
        return "model.safetensors"
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files and no {INDEX} to say which hold the model"
        )
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when read, and is refused: "
            "convert it (load the model with transformers and call save_pretrained on it)"
        )
    raise CheckpointError(f"{folder}: holds no safetensors file: no weights to load")
