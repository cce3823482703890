"""Where a model's tokenizer and its end tokens are read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.text.bare import TokenizerLike
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import TokenizersBackend

# Any of these makes a folder one that claims to have a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_tokenizer(
    path: str, gguf: str | None, revision: str | None
) -> tuple[TokenizerLike, tuple[int, ...] | None] | None:
    """The tokenizer of a folder or hub id, or of the GGUF file `gguf` in it, and the end tokens
    stated beside it, None where none are; None where there is no tokenizer.

    Raises `CheckpointError` for a tokenizer that cannot be read.
    """
    if gguf is not None:
        from cluster.text.gguf import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(_file(path, gguf, revision))
        return None if tokenizer is None else (tokenizer, None)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return _load_folder(path, revision), _generation_eos(path, revision)


def _load_folder(path: str, revision: str | None) -> TokenizersBackend:
    from transformers import AutoTokenizer, TokenizersBackend

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            local_files_only=Path(path).is_dir(),
            trust_remote_code=False,
        )
    # The Rust tokenizer raises bare Exception for a malformed tokenizer.json.
    except Exception as error:
        raise CheckpointError(
            f"The tokenizer in {path} cannot be read ({error}): fetch its files again, or remove "
            "them to serve token ids only."
        ) from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise CheckpointError(
            f"The tokenizer in {path} is a {type(tokenizer).__name__} without a tokenizer.json: "
            "convert it with transformers' save_pretrained, or remove it to serve token ids only."
        )
    return tokenizer


def _generation_eos(path: str, revision: str | None) -> tuple[int, ...] | None:
    """End tokens of generation_config.json; None where it is missing or does not name any."""
    from transformers.utils import cached_file

    file = cached_file(
        path,
        "generation_config.json",
        revision=revision,
        local_files_only=Path(path).is_dir(),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        eos = json.loads(Path(file).read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): fetch it again, or remove it."
        ) from error
    if eos is None:
        return None
    tokens = eos if isinstance(eos, list) else [eos]
    if any(type(token) is not int or token < 0 for token in tokens):
        raise CheckpointError(
            f"{file}: eos_token_id is {eos!r}: a token id or a list of them is needed"
        )
    return tuple(tokens)


def _file(path: str, name: str, revision: str | None) -> Path:
    """A file of a folder, or of a hub id's local copy."""
    folder = Path(path)
    if folder.is_dir():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"There is no file {name} in {path}: check its name.")
        return file
    from transformers.utils import cached_file

    try:
        return Path(cached_file(path, name, revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} of {path} cannot be fetched ({error}): check both names."
        ) from error
