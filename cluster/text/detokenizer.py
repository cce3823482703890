"""Token ids to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes and a token at least one, so an incomplete character at the end
# spans at most 3 tokens and shows as at most 3 replacement characters.
_INCOMPLETE = 3
# Without a clean boundary for this many tokens the bytes are no text, and the window is cut to the
# last `_KEPT`: enough for the replacement characters in it to fall as they would in the whole.
_MOST = 32
_KEPT = 16
# How far back the context may be searched for a token that begins a character.
_LOOKBACK = 256


class Decoder(Protocol):
    """What is needed of a `TextCodec` to turn token ids into text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one growing sequence, in deltas.

    Decoding token by token would break characters that span tokens and drop the space with which
    SentencePiece-like tokenizers begin a word. So a window is decoded that begins with the tokens
    whose text came last, and what is new in it is emitted. Work per token is bounded.

    `prompt_tail_ids` is what stands before (all of it or its end). A character that the context
    leaves incomplete counts as new: a sequence resumed in the middle of a character goes on as if
    it had never stopped. Deltas and `flush` together are what the whole sequence decodes to, less
    the context. One exception: tokenizers with byte fallback turn a whole run of byte tokens into
    U+FFFD once one of them is invalid, in hindsight; characters already emitted stay.
    """

    def __init__(
        self,
        codec: Decoder,
        prompt_tail_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        context = self._begin_context(prompt_tail_ids)
        clean = len(context)
        while clean > max(0, len(context) - _INCOMPLETE) and self._text(context[:clean]).endswith(
            _REPLACEMENT
        ):
            clean -= 1
        self._window = context[:clean]
        self._mark = clean  # the text of window[:mark] is out, and ends with a whole character
        self._sent = self._text(self._window)  # the beginning of the window's text that is out
        for token in context[clean:]:
            self._step(token)

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete. A character that is still incomplete is held back."""
        return "".join([self._step(token) for token in ids])

    def flush(self) -> str:
        """What is held back, at the end of the sequence: U+FFFD for an incomplete character."""
        text = self._text(self._window)
        if text.startswith(self._sent):
            rest = text[len(self._sent) :]
        else:
            rest = self._text(self._window[self._mark :])
        self._sent = text
        self._mark = len(self._window)
        return rest

    def _text(self, ids: list[int]) -> str:
        return self._codec.decode(ids, self._skip)

    def _is_shown(self, token: int) -> bool:
        """Whether the decoder looks at it: it is known, and not special if those are skipped."""
        # Alone, a token that is one space may show nothing: SentencePiece drops the first space.
        return bool(self._text([token]) or self._text([token, token]))

    def _step(self, token: int) -> str:
        if not self._is_shown(token):
            return ""
        self._window.append(token)
        text = self._text(self._window)
        if not text.startswith(self._sent):
            # Byte fallback: an incomplete character makes the whole run of bytes before it invalid.
            if len(self._window) - self._mark <= _INCOMPLETE:
                return ""
            self._window = self._window[self._mark :]
            self._mark = 0
            self._sent = ""
            text = self._text(self._window)
        new = text[len(self._sent) :]
        held = min(_INCOMPLETE, len(new) - len(new.rstrip(_REPLACEMENT)))
        delta = new[: len(new) - held]
        if delta and not held:
            self._window = self._window[self._mark :]
            self._mark = len(self._window)
            self._sent = self._text(self._window)
        else:
            self._sent += delta
            if len(self._window) - self._mark > _MOST:
                self._cut(held)
        return delta

    def _cut(self, held: int) -> None:
        self._window = self._window[-_KEPT:]
        self._mark = len(self._window)
        text = self._text(self._window)
        self._sent = text[: len(text) - held]

    def _begin_context(self, ids: Sequence[int]) -> list[int]:
        """The last few shown ids, beginning with one that shows text and no part of a character."""
        context: list[int] = []
        for token in reversed(ids[-_LOOKBACK:]):
            if not self._is_shown(token):
                continue
            context.append(token)
            if len(context) > _INCOMPLETE:
                alone = self._text([token])
                if alone and _REPLACEMENT not in alone:
                    break
        context.reverse()
        return context
