"""From what a user calls a model to the files on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.errors import CheckpointError, UnsupportedModel

CONFIG = "config.json"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
_CONFIGS = (CONFIG, "generation_config.json")
_TOKENIZER = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*_tokens*.json",
    "chat_template*",
    "*.model",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Located:
    """A folder with a config.json, or a GGUF file."""

    kind: Literal["folder", "gguf"]
    path: Path


def locate(model: str, revision: str | None, *, weights: bool) -> Located:
    """Find `model`: a folder, a config.json, a GGUF file, or a hub id, fetched or in the cache.

    Without `weights` the config alone is fetched. Raises `CheckpointError` where nothing is found,
    `UnsupportedModel` for a GGUF split over several files.
    """
    path = Path(model).expanduser()
    try:
        # An empty name would be the current folder.
        if model and path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return _file(path)
    except OSError as error:
        raise CheckpointError(f"model {model!r} cannot be read: {error.strerror}") from error
    return Located("folder", _fetch(model, revision, weights=weights))


def _file(path: Path) -> Located:
    if path.suffix == ".gguf":
        _refuse_split(path)
        return Located("gguf", path)
    if path.name == CONFIG:
        return Located("folder", path.parent)
    raise CheckpointError(
        f"{path}: neither a .gguf file nor a {CONFIG}: give the folder that holds {CONFIG} and the "
        "safetensors files, or a .gguf file"
    )


def _in_folder(folder: Path) -> Located:
    if (folder / CONFIG).is_file():
        return Located("folder", folder)
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        _refuse_split(found[0])
        return Located("gguf", found[0])
    if found:
        _refuse_split(found[0])
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: holds several GGUF files, give one of them: {names}")
    raise CheckpointError(f"{folder}: holds neither {CONFIG} nor a .gguf file: no model is there")


def _refuse_split(path: Path) -> None:
    if _SPLIT.fullmatch(path.name):
        raise UnsupportedModel(
            f"{path}: one of several files of a split GGUF: merge them into one (llama.cpp's "
            "gguf-split --merge) and give that"
        )


def is_hub_id(name: str) -> bool:
    """Whether a hub can be asked for it: of the form owner/name, or a name alone."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _fetch(model: str, revision: str | None, *, weights: bool) -> Path:
    if not is_hub_id(model):
        raise CheckpointError(
            f"model {model!r} not found: no such path, and not of the form of a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        # What it raises ranges over the exceptions of three HTTP and cache layers.
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_CONFIGS, *((*_TOKENIZER, *_WEIGHTS) if weights else ())],
        )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"model {model!r} not found: no such path, and the hub did not give it "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); check the "
            "name, the revision and the network, or give the path of a downloaded folder"
        ) from error
    return Path(folder)
