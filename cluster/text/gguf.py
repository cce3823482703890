"""The tokenizer inside a GGUF file.

`transformers` converts it, which takes seconds: it parses the metadata in Python and imports torch.
So the result is kept as a tokenizer.json in the user's cache, which loads in a fraction of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import TokenizersBackend


def load_gguf_tokenizer(file: Path) -> TokenizersBackend | None:
    """The tokenizer of a GGUF file; None where the file carries none.

    Raises `CheckpointError` for a file that is not GGUF, is truncated, or holds a kind of tokenizer
    that `transformers` cannot convert.
    """
    entry = _cache_entry(file)
    if entry is not None:
        cached = _read(entry)
        if cached is not None:
            return cached
    tokenizer = _convert(file)
    if tokenizer is not None and entry is not None:
        # A cache that cannot be written (read-only home, full disk) costs time, nothing else.
        with contextlib.suppress(OSError):
            _write(entry, tokenizer)
    return tokenizer


def _convert(file: Path) -> TokenizersBackend | None:
    from transformers import TokenizersBackend

    try:
        # The constructor rather than from_pretrained: that would prefer a stray tokenizer.json
        # beside the file, and derive a model config that nobody needs.
        return TokenizersBackend(name_or_path=str(file.parent), gguf_file=file.name)
    except Exception as error:
        try:
            has_tokenizer = _has_tokenizer(file)
        except Exception:
            raise CheckpointError(
                f"{file} is not a readable GGUF file ({error}): fetch it again."
            ) from error
        if not has_tokenizer:
            return None
        raise CheckpointError(
            f"The tokenizer in {file} cannot be converted ({error}): name a folder with the "
            "model's tokenizer.json as the tokenizer."
        ) from error


def _has_tokenizer(file: Path) -> bool:
    """Slow for a large vocabulary; asked only when the conversion has failed."""
    from gguf import GGUFReader

    return GGUFReader(file).get_field("tokenizer.ggml.tokens") is not None


def _cache_entry(file: Path) -> Path | None:
    """The folder for this very file (path, size, time of change) as this version of `transformers`
    converts it; None where the user has no home."""
    import transformers

    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    path, stat = file.resolve(), file.stat()
    identity = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{transformers.__version__}"
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    return root / "headwise" / "tokenizers" / name


def _read(entry: Path) -> TokenizersBackend | None:
    """None where there is no entry; one that cannot be read is removed."""
    from transformers import TokenizersBackend

    if not entry.is_dir():
        return None
    try:
        return TokenizersBackend.from_pretrained(str(entry), local_files_only=True)
    except Exception:
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _write(entry: Path, tokenizer: TokenizersBackend) -> None:
    """Appears whole or not at all; where another process was first, its entry stays."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, ignore_cleanup_errors=True) as scratch:
        whole = Path(scratch) / "whole"
        tokenizer.save_pretrained(str(whole))
        whole.rename(entry)
