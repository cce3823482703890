"""What a codec needs of a tokenizer, as plain data that any process can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from shards.errors import CheckpointError

_FORMAT = "headwise tokenizer 1"


class TokenizerLike(Protocol):
    """`transformers.TokenizersBackend`, or a `BareTokenizer`."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The Rust tokenizer."""
        ...

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """What its special tokens are for: `eos_token` and so on, each with its text."""
        ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """One template, several by name, or none."""
        ...


@dataclass(frozen=True, slots=True)
class BareTokenizer:
    """A tokenizer without `transformers` around it."""

    backend_tokenizer: Tokenizer
    special_tokens_map: Mapping[str, str]
    chat_template: str | Mapping[str, str] | None = None


def pack(tokenizer: TokenizerLike, eos_token_ids: tuple[int, ...]) -> bytes:
    """A tokenizer and the tokens that end an answer, as JSON."""
    template = tokenizer.chat_template
    content = {
        "format": _FORMAT,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": dict(tokenizer.special_tokens_map),
        "chat_template": dict(template) if isinstance(template, Mapping) else template,
        "eos_token_ids": eos_token_ids,
    }
    return json.dumps(content).encode()


def unpack(data: bytes) -> tuple[BareTokenizer, tuple[int, ...]]:
    """What `pack` was given. Raises `CheckpointError` for anything else."""
    try:
        content: dict[str, Any] = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, {_FORMAT!r} is known")
        tokenizer = BareTokenizer(
            Tokenizer.from_str(content["tokenizer"]),
            content["special_tokens"],
            content["chat_template"],
        )
        return tokenizer, tuple(content["eos_token_ids"])
    # The Rust tokenizer raises bare Exception for what it cannot read.
    except Exception as error:
        raise CheckpointError(
            f"not a packed tokenizer ({type(error).__name__}: {error}): pack it again with this "
            "version of headwise"
        ) from error
