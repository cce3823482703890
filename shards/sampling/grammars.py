"""Holds the texts of slots to grammars: bars the tokens with which no text of a grammar goes on.

Shapes: S sequences of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from shards.contract import NO_TOKEN, Sampling
from shards.grammar import GrammarError, GrammarTokenizer, Matcher

# Requests often share a grammar; a compiled one that has not matched anything yet is small.
_GRAMMARS_KEPT = 64


class _Text:
    """A slot's text: `pending` tokens are yet to be matched; after an end token it has `ended`."""

    def __init__(self, grammar: str, end_tokens: tuple[int, ...], pending: list[int]) -> None:
        self.grammar = grammar
        self.end_tokens = end_tokens
        self.pending = pending
        self.matcher: Matcher | None = None
        self.fault = ""
        self.ended = False


class Grammars:
    """The grammars of every slot that is held to one."""

    def __init__(self, tokenizer: GrammarTokenizer | None) -> None:
        self._texts: dict[int, _Text] = {}
        self._compile = None if tokenizer is None else lru_cache(_GRAMMARS_KEPT)(tokenizer.compile)

    def start(self, slot: int, sampling: Sampling, generated: np.ndarray) -> None:
        """A sequence takes a slot; `generated` int32: the tokens that its text begins with."""
        self.end(slot)
        if sampling.grammar:
            self._texts[slot] = _Text(sampling.grammar, sampling.end_tokens, generated.tolist())

    def end(self, slot: int) -> None:
        self._texts.pop(slot, None)

    def fault(self, slot: int) -> str:
        """Why nothing may follow in a slot's text, "" where something does."""
        text = self._texts.get(slot)
        return "" if text is None else text.fault

    def record(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """`tokens[i]` was generated for `slots[i]`; it may be `NO_TOKEN`."""
        if self._texts:
            for slot, token in zip(slots, tokens, strict=True):
                text = self._texts.get(slot)
                if text is not None and token != NO_TOKEN:
                    text.ended |= token in text.end_tokens
                    text.pending.append(token)

    def apply(self, scores_SV: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """`scores_SV`, not modified, with -inf for every token that may not come next.

        Matching belongs here, behind the launch of the logits, which a device is still computing.
        """
        held = [(row, self._texts[slot]) for row, slot in enumerate(slots) if slot in self._texts]
        # What follows an end token was planned before it was drawn: nobody will see it.
        held = [(row, text) for row, text in held if not text.ended]
        if not held:
            return scores_SV
        barred_SV = np.zeros(scores_SV.shape, np.bool_)
        for row, text in held:
            np.logical_not(self._allowed(text, scores_SV.shape[1]), out=barred_SV[row])
        return scores_SV.masked_fill(torch.from_numpy(barred_SV).to(scores_SV.device), -torch.inf)

    def _allowed(self, text: _Text, vocabulary: int) -> np.ndarray:
        """bool [V]; none where the text cannot go on, and `fault` says why."""
        try:
            matcher = self._matcher(text)
        except GrammarError as error:
            text.fault = str(error)
            return np.zeros(vocabulary, np.bool_)
        for token in text.pending:
            matcher.advance(token)
        text.pending.clear()
        allowed_V = matcher.allowed(text.end_tokens, vocabulary)
        if not allowed_V.any():
            text.fault = matcher.failed or "no token of the model goes on with the text"
        return allowed_V

    def _matcher(self, text: _Text) -> Matcher:
        if text.matcher is None:
            if self._compile is None:
                raise GrammarError("the model has no tokenizer that grammars go with")
            text.matcher = self._compile(text.grammar).copy()
        return text.matcher
