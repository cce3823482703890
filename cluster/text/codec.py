"""Text to token ids and back, and conversations to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from cluster.errors import InvalidRequest, Violation
from cluster.text.bare import TokenizerLike, pack, unpack
from cluster.text.chat import ChatTemplate

# The roles of tokens that end an answer; a GGUF file may name all three.
_ENDS = ("eos_token", "eot_token", "eom_token")
# Special tokens that end a turn which calls a tool. Files that name the end of an answer often
# leave them out: Llama 3.1's and GPT-OSS's.
_ENDS_OF_CALLS = ("<|eom_id|>", "<|call|>")


class TextCodec:
    """Turns text and conversations into token ids, and token ids into text.

    Equal to the `transformers` tokenizer it is made of. It calls the Rust tokenizer behind it
    directly: `transformers` sets truncation and padding on every call, which is several times
    slower per token and not safe when threads share a tokenizer. A codec may be shared between
    threads.
    """

    def __init__(
        self, tokenizer: TokenizerLike, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        """`eos_token_ids` come on top of the tokenizer's own end token. None takes the special
        token that the chat template puts behind an answer, since base models name only the end of a
        document, and those known to end a tool call."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        template = tokenizer.chat_template
        self._template = ChatTemplate(template, tokenizer.special_tokens_map) if template else None
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        further = self._ends_of_answers() if eos_token_ids is None else eos_token_ids
        self._eos_token_ids = tuple(dict.fromkeys((*self._own_ends(), *further)))
        self._anchor = self.encode("a", add_special_tokens=False)
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)

    @classmethod
    def load(
        cls, path: str, gguf: str | None = None, revision: str | None = None
    ) -> TextCodec | None:
        """Read the tokenizer of a folder or hub id, or of the GGUF file `gguf` in it.

        None where there is none: the model then takes and gives token ids only. A tokenizer that
        is there and cannot be read raises `CheckpointError`; a GGUF's of a kind that is not known,
        `UnsupportedModel`.

        The end tokens are the tokenizer's and those of generation_config.json, or, where that file
        does not say, the chat template's; a GGUF's are all that it names, and the template's.
        """
        from cluster.text.source import load_tokenizer

        found = load_tokenizer(path, gguf, revision)
        return None if found is None else cls(*found)

    @classmethod
    def unpack(cls, data: bytes) -> TextCodec:
        """The codec that `pack` was called on. Raises `CheckpointError` for other bytes."""
        return cls(*unpack(data))

    def pack(self) -> bytes:
        """This codec, templates and end tokens included, for a process that cannot read the
        model's folder. Plain data: unpacking runs no code of the sender's."""
        return pack(self._tokenizer, self._eos_token_ids)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer.json of the Rust tokenizer, without truncation and padding."""
        return str(self._backend.to_str())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; the tokenizer's own first."""
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def supports_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self._template is not None and self._template.supports_tools

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

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, as `transformers`' `apply_chat_template` gives them.

        A message is a mapping of `role`, `content` and what else the template reads (`name`,
        `tool_calls`, `tool_call_id`, `reasoning_content`); fields that are None count as absent,
        and the arguments of tool calls may be JSON text or objects. `tools` are OpenAI's
        descriptions, none if empty; a template without a place for them leaves them out. The text
        ends where the model's answer begins (`add_generation_prompt`), or inside the last message
        (`continue_final_message`), or with it (neither). `template_arguments` are variables of the
        template, such as `enable_thinking`.

        Raises `InvalidRequest` where the model has no chat template (field "messages"), where the
        template refuses the messages, with its own words, and for arguments that clash with others
        ("continue_final_message", "template_arguments.NAME").
        """
        if not messages:
            raise _refused("there is no message: give at least one")
        if self._template is None:
            raise _refused("this model has no chat template: use Generate with a prompt")
        text = self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            arguments=template_arguments,
        )
        return self._encode(text, False, "messages")

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

    def _own_ends(self) -> tuple[int, ...]:
        texts = map(self._tokenizer.special_tokens_map.get, _ENDS)
        ids = (self._backend.token_to_id(text) for text in texts if text is not None)
        return tuple(token for token in ids if token is not None)

    def _ends_of_answers(self) -> tuple[int, ...]:
        """What stands behind an assistant's message in the chat template, if it is a special token,
        and the tokens known to end a tool call."""
        calls = (self._backend.token_to_id(token) for token in _ENDS_OF_CALLS)
        known = tuple(token for token in calls if token in self._special)
        if self._template is None:
            return known
        answer = "headwise"
        dialogue = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
        try:
            rendered = self._template.render(dialogue, add_generation_prompt=False)
        except InvalidRequest:
            return known
        _, found, behind = rendered.rpartition(answer)
        ids = self.encode(behind, add_special_tokens=False)
        return (ids[0], *known) if found and ids and ids[0] in self._special else known


def _refused(description: str) -> InvalidRequest:
    return InvalidRequest(Violation("messages", description))
