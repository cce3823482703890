"""Picks the next tokens of a batch from its logits. Runs on rank 0, on CPU or CUDA.

Order: logit bias, barred tokens, repetition, presence and frequency penalties, grammar,
temperature, top-k, top-p, min-p, then a draw with one random number that depends on (seed,
position) alone. So a sequence gets the same tokens in any batch, and again after a preemption or a
lost rank.
Shapes: S sequences of the step, R those that draw at random, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shards.contract import NO_TOKEN, Logprobs, Sampling
from shards.errors import HeadwiseError
from shards.grammar import GrammarTokenizer
from shards.sampling.adjustments import Adjustments
from shards.sampling.grammars import Grammars
from shards.sampling.logprobs import token_logprobs
from shards.sampling.philox import uniform
from shards.sampling.truncation import draw

# Below this a float32 temperature divides into nonsense; its limit is greedy.
_COLDEST = float(np.finfo(np.float32).tiny)

_SEED = (1 << 64) - 1

# Prompt logits are turned into log probabilities so many elements (64 MB) at a time.
_PROMPT_ELEMENTS = 1 << 24


class SamplingError(HeadwiseError):
    """Parameters of `slot` with which no token could ever be picked; the driver refuses them."""

    def __init__(self, message: str, slot: int) -> None:
        super().__init__(message)
        self.slot = slot


class Sampler:
    """Sampling state of `slots` slots over a vocabulary of `vocabulary` tokens.

    Without a `tokenizer`, no token can be picked for a slot that is held to a grammar.
    """

    def __init__(
        self,
        vocabulary: int,
        slots: int,
        device: torch.device | str,
        tokenizer: GrammarTokenizer | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._device = torch.device(device)
        self._adjustments = Adjustments(self._device)
        self._grammars = Grammars(tokenizer)
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.full(slots, vocabulary, np.int64)
        self._top_p = np.ones(slots, np.float64)
        self._min_p = np.zeros(slots, np.float32)
        self._seed = np.zeros(slots, np.uint64)
        self._logprobs = np.full(slots, -1, np.int64)

    def start(self, slot: int, sampling: Sampling, tokens: np.ndarray, prompt_length: int) -> None:
        """A sequence takes a slot. `tokens`: ids of its prompt and of what it already generated.

        Raises `SamplingError` for token ids outside the vocabulary and where all are barred.
        """
        self._check_tokens(slot, sampling)
        self._temperature[slot] = 0 if sampling.temperature < _COLDEST else sampling.temperature
        off = not 0 < sampling.top_k < self._vocabulary
        self._top_k[slot] = self._vocabulary if off else sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sampling.seed & _SEED
        self._logprobs[slot] = sampling.logprobs
        self._adjustments.start(slot, sampling, tokens, prompt_length)
        self._grammars.start(slot, sampling, tokens[prompt_length:])

    def end(self, slot: int) -> None:
        """The slot's sequence is gone."""
        self._adjustments.end(slot)
        self._grammars.end(slot)

    def fault(self, slot: int) -> str:
        """Why a slot's grammar lets nothing follow; "" if it does, or there is none."""
        return self._grammars.fault(slot)

    def sample(
        self,
        logits_SV: torch.Tensor,
        slots: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
    ) -> tuple[list[int], list[Logprobs | None]]:
        """The next token of each slot, and its log probabilities where the slot asks for them.

        `logits_SV` float32, not modified. `positions` are those of the tokens being picked. Each
        token counts as generated from here on. `NO_TOKEN` stands where none can be picked: the
        slot's logits hold NaN or infinity, every token is barred, or see `fault`.
        """
        at = np.asarray(slots, np.int64)
        scores_SV = self._adjustments.apply(logits_SV, slots, positions)
        scores_SV = self._grammars.apply(scores_SV, at.tolist())
        picked_S = scores_SV.argmax(-1)
        highest_S = scores_SV.gather(-1, picked_S[:, None]).squeeze(-1)
        random = np.flatnonzero(self._temperature[at])
        if len(random):
            row_R = self._move(random)
            picked_S[row_R] = self._draw(
                scores_SV if len(random) == len(at) else scores_SV[row_R],
                highest_S[row_R],
                at[random],
                np.asarray(positions, np.int64)[random],
            )
        # argmax takes NaN for the largest, so the highest score tells of any fault in the row.
        usable_S = torch.isfinite(highest_S)
        tokens: list[int] = picked_S.masked_fill_(~usable_S, 0).tolist()
        self._adjustments.record(slots, tokens)
        logprobs = self._logprobs_of(logits_SV, at, tokens)
        usable = usable_S.tolist()
        if not all(usable):
            tokens = [t if ok else NO_TOKEN for t, ok in zip(tokens, usable, strict=True)]
        self._grammars.record(at.tolist(), tokens)
        return tokens, logprobs

    def prompt_logprobs(
        self, logits_TV: torch.Tensor, next_tokens: Sequence[int] | np.ndarray, top_n: int
    ) -> tuple[Logprobs, ...]:
        """Of `next_tokens[t]`, which follows position t, and the `top_n` most probable there.

        `logits_TV` float32 [T positions of one prompt, V].
        """
        rows = max(1, _PROMPT_ELEMENTS // self._vocabulary)
        found: list[Logprobs] = []
        for start in range(0, len(next_tokens), rows):
            tokens = [int(token) for token in next_tokens[start : start + rows]]
            logits = logits_TV[start : start + len(tokens)]
            found += token_logprobs(logits, tokens, [top_n] * len(tokens))
        return tuple(found)

    def _draw(
        self,
        scores_RV: torch.Tensor,
        highest_R: torch.Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
    ) -> torch.Tensor:
        return draw(
            scores_RV,
            highest_R,
            self._move(self._temperature[slots]),
            self._move(self._top_k[slots]),
            self._move(self._top_p[slots]),
            self._move(self._min_p[slots]),
            self._move(uniform(self._seed[slots], positions)),
        )

    def _logprobs_of(
        self, logits_SV: torch.Tensor, slots: np.ndarray, tokens: list[int]
    ) -> list[Logprobs | None]:
        found: list[Logprobs | None] = [None] * len(tokens)
        top_n = self._logprobs[slots]
        asked = np.flatnonzero(top_n >= 0)
        if len(asked):
            picked = [tokens[row] for row in asked]
            rows = token_logprobs(logits_SV[self._move(asked)], picked, top_n[asked].tolist())
            for row, logprobs in zip(asked, rows, strict=True):
                found[row] = logprobs
        return found

    def _check_tokens(self, slot: int, sampling: Sampling) -> None:
        for field, tokens in (("logit_bias", sampling.logit_bias), ("barred", sampling.barred)):
            for token in tokens:
                if not 0 <= token < self._vocabulary:
                    raise SamplingError(
                        f"{field}: token {token} is outside the vocabulary; "
                        f"use ids from 0 to {self._vocabulary - 1}",
                        slot,
                    )
        if sampling.barred_before > 0 and len(set(sampling.barred)) == self._vocabulary:
            raise SamplingError(
                "min_tokens: every token of the vocabulary would end the text; "
                "set min_tokens to 0 or stop at fewer tokens",
                slot,
            )

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
