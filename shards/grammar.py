"""Grammars that a text is held to, over the tokens of one model. By llguidance; no torch.

A `Matcher` walks one text: it tells which tokens may come next, and takes the one that did. What it
allows is a function of the grammar and the tokens taken alone, so a text that is computed again
(after a preemption, on another replica) goes on under the same masks.

llguidance bounds what one token may cost (`_LIMITS`), but not what compiling costs: some grammars
of a few bytes take seconds or end the process. `shards/grammar_sandbox.py` finds those out before
they come here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shards.errors import HeadwiseError

# A state of the lexer takes up to 2 KiB: 40 MiB for a text at the very most. The other limits are
# llguidance's own: a mask took 60 ms at worst in what was tried before its text was given up.
_LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
_MOST_REASON = 400


class GrammarError(HeadwiseError, ValueError):
    """A grammar that cannot be compiled, or a tokenizer that no grammar can be held over."""


class GrammarTokenizer:
    """What the tokens of a model spell. Building one takes 0.3 s for 49,000 tokens."""

    def __init__(self, tokenizer_json: str, end_tokens: Collection[int]) -> None:
        """`tokenizer_json` is a tokenizer.json's text; `end_tokens` are the model's own.

        Raises `GrammarError` for a tokenizer whose tokens do not stand for fixed bytes.
        """
        try:
            self._tokenizer = LLTokenizer(tokenizer_json, eos_token=sorted(end_tokens) or None)
        except ValueError as error:
            raise GrammarError(f"the tokens do not stand for fixed bytes ({error})") from None

    @property
    def size(self) -> int:
        """Tokens it knows; a model may have rows for more."""
        return self._tokenizer.vocab_size

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the beginning of a text. Raises `GrammarError` with llguidance's reason."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return Matcher(matcher, self._tokenizer.eos_tokens)


class Matcher:
    """Where one text stands in its grammar. Once it has `failed`, it allows nothing."""

    def __init__(self, matcher: LLMatcher, own_ends: Collection[int]) -> None:
        self._matcher = matcher
        self._own_ends = list(own_ends)

    @property
    def failed(self) -> str:
        """Why it cannot go on: a token that breaks the grammar, a limit; "" if it can."""
        return _reason(self._matcher) if self._matcher.is_error() else ""

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def copy(self) -> Matcher:
        """Another text that stands where this one does; takes 10 us."""
        return Matcher(self._matcher.deep_copy(), self._own_ends)

    def advance(self, token: int) -> bool:
        """Take the next token, none that ends the text; False where that breaks the grammar."""
        return bool(self._matcher.consume_token(token))

    def allowed(self, end_tokens: Sequence[int], vocabulary: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next: bool [vocabulary], the model's, which the tokenizer need not
        fill. `end_tokens` may where, and only where, the text is complete."""
        allowed_V = np.zeros(vocabulary, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return allowed_V
        known = np.unpackbits(bits, count=min(8 * len(bits), vocabulary), bitorder="little")
        allowed_V[: len(known)] = known
        # A request's end tokens take the place of the tokenizer's.
        allowed_V[[token for token in self._own_ends if token < vocabulary]] = False
        allowed_V[list(end_tokens)] = self.complete
        return allowed_V


def _reason(matcher: LLMatcher) -> str:
    """llguidance's own words, without its internal state."""
    reason = matcher.get_error().partition("<")[0].strip()
    return reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]}..."
