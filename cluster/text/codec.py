"""A model's tokenizer and chat template, as `transformers` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InvalidRequest, Violation
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


class TextCodec:
    """Turns text and conversations into token ids, and token ids into text.

    Equal to the `transformers` tokenizer it wraps. It calls the Rust tokenizer behind it directly:
    `transformers` sets truncation and padding on every call, which is several times slower per
    token and not safe when threads share a tokenizer. A codec may be shared between threads.
    """

    def __init__(
        self, tokenizer: TokenizersBackend, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        """`eos_token_ids` come on top of the tokenizer's own end token; None takes the special
        token that the chat template puts behind an answer: base models name only the end of a
        document."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        eos = tokenizer.eos_token_id
        own = () if eos is None else (int(eos),)
        further = self._end_of_answer() if eos_token_ids is None else eos_token_ids
        self._eos_token_ids = tuple(dict.fromkeys((*own, *further)))
        self._anchor = self.encode("a", add_special_tokens=False)
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)

    @classmethod
    def load(
        cls, path: str, gguf: str | None = None, revision: str | None = None
    ) -> TextCodec | None:
        """Read the tokenizer of a folder or hub id, or of the GGUF file `gguf` in it.

        None where there is none: the model then takes and gives token ids only. A tokenizer that
        is there and cannot be read raises `CheckpointError`.

        The end tokens are the tokenizer's and those of generation_config.json, or, where that file
        does not say (a GGUF has none), the chat template's.
        """
        if gguf is not None:
            from cluster.text.gguf import load_gguf_tokenizer

            tokenizer = load_gguf_tokenizer(_file(path, gguf, revision))
            return None if tokenizer is None else cls(tokenizer)
        folder = Path(path)
        if folder.is_dir() and not _claims_tokenizer(folder):
            return None
        return cls(_load_folder(path, revision), _generation_eos(path, revision))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; the tokenizer's own first."""
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    @property
    def size(self) -> int:
        """Entries of the tokenizer, added tokens included; the model may have padded rows more."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def longest_token_bytes(self) -> int:
        """Most bytes of UTF-8 that one token can stand for (at most twice as many, if byte-level:
        there the vocabulary spells many bytes as two)."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return max((len(token.encode()) for token in vocabulary), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; strings that spell a special token become that token.

        Raises `InvalidRequest` (field "prompt") for a lone surrogate, which is not Unicode text.
        """
        return self._encode(text, add_special_tokens, "prompt")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 give U+FFFD, unknown ids give nothing."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text: with its leading space, special tokens
        spelled out, U+FFFD for bytes that are only a part of a character."""
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text[len(self._anchor_text) :]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises `InvalidRequest` (field "messages") where there is no message, the model has no chat
        template, or the template does not take these roles in this order.
        """
        if not messages:
            raise _refused("there is no message: give at least one")
        if not self.has_chat_template:
            raise _refused("this model has no chat template: use Generate with a prompt")
        return self._encode(self._render(messages, answer_next=True), False, "messages")

    def _encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                Violation(
                    field,
                    f"it holds the lone surrogate {text[error.start]!r}, which no UTF-8 text can: "
                    "remove it or decode the text correctly",
                )
            ) from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        from jinja2 import TemplateError

        conversation = [dict(message) for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=answer_next, tokenize=False
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:8])
            raise _refused(
                f"the model's chat template refuses a conversation of roles {roles} "
                f"({error}): use the roles it knows, in the order it wants"
            ) from error

    def _end_of_answer(self) -> tuple[int, ...]:
        """The special token right behind an assistant's message in the chat template, if any."""
        if not self.has_chat_template:
            return ()
        answer = "headwise"
        dialogue = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
        try:
            rendered = self._render(dialogue, answer_next=False)
        except InvalidRequest:
            return ()
        _, found, behind = rendered.rpartition(answer)
        ids = self.encode(behind, add_special_tokens=False)
        return (ids[0],) if found and ids and ids[0] in self._special else ()


def _refused(description: str) -> InvalidRequest:
    return InvalidRequest(Violation("messages", description))


def _claims_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


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
        if eos is None:
            return None
        return tuple(int(token) for token in (eos if isinstance(eos, list) else [eos]))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): fetch it again, or remove it."
        ) from error


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
