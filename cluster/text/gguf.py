"""The tokenizer inside a GGUF file.

Building it takes seconds: transformers, which reads the metadata, imports torch. So the result is
kept in the user's cache, from which it loads in a fraction of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from cluster.text.bare import BareTokenizer, pack, unpack
from shards.errors import CheckpointError, UnsupportedModel

# Raise it whenever the same file makes another tokenizer.
_REVISION = 1
_STRINGS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def load_gguf_tokenizer(file: Path) -> BareTokenizer | None:
    """The tokenizer of a GGUF file; None where the file carries none.

    Raises `CheckpointError` for a file that is not GGUF, is truncated, or whose tokenizer's parts
    do not fit together; `UnsupportedModel` for a kind of tokenizer that is not known.
    """
    entry = _cache_entry(file)
    if entry is not None:
        with contextlib.suppress(OSError, CheckpointError):  # none there, or a damaged one
            return unpack(entry.read_bytes())[0]
    tokenizer = _build(file)
    if tokenizer is not None and entry is not None:
        # A cache that cannot be written (read-only home, full disk) costs time, nothing else.
        with contextlib.suppress(OSError):
            _write(entry, pack(tokenizer, ()))
    return tokenizer


def _build(file: Path) -> BareTokenizer | None:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    from cluster.text.gguf_tokenizer import build_tokenizer

    try:
        metadata, _ = read_gguf_metadata(str(file), _STRINGS)
    # A truncated or foreign file makes the reader fail with anything.
    except Exception as error:
        raise CheckpointError(
            f"{file} is not a readable GGUF file ({error}): fetch it again."
        ) from error
    try:
        return build_tokenizer(metadata)
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"the tokenizer in {file}: {error}") from error
    # The Rust tokenizer raises bare Exception for parts that do not fit.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {file} cannot be built ({error}): give the folder of the model's "
            "tokenizer.json with --tokenizer"
        ) from error


def _cache_entry(file: Path) -> Path | None:
    """Where this very file's (path, size, time of change) is kept; None where the user has no
    home."""
    import tokenizers

    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    path, stat = file.resolve(), file.stat()
    identity = (path, stat.st_size, stat.st_mtime_ns, _REVISION, tokenizers.__version__)
    name = hashlib.sha256(
        "\n".join(map(str, identity)).encode(errors="surrogateescape")
    ).hexdigest()[:32]
    return root / "headwise" / "tokenizers" / f"{name}.json"


def _write(entry: Path, data: bytes) -> None:
    """Appears whole or not at all."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as scratch:
        try:
            scratch.write(data)
            scratch.close()
            Path(scratch.name).replace(entry)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise
