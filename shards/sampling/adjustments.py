"""What changes logits before a token is picked: bias, barred tokens, penalties.

Everything is sparse: a sequence names the few tokens that it touches, and a step gathers those
(row, token) pairs of the whole batch, changes them and writes them back. Shapes: S sequences,
V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shards.contract import Sampling

Ids = Sequence[int] | np.ndarray


@dataclass(slots=True)
class _Edits:
    """Logits to add to and to bar; int64 token ids, float32 values."""

    bias_tokens: np.ndarray
    bias_values: np.ndarray
    barred: np.ndarray
    barred_before: int


class _History:
    """The distinct tokens of a sequence and how often each was generated; 0 is prompt only."""

    def __init__(self, sampling: Sampling, tokens: np.ndarray, prompt_length: int) -> None:
        self.repetition = sampling.repetition_penalty
        self.presence = sampling.presence_penalty
        self.frequency = sampling.frequency_penalty
        # Only the repetition penalty looks at the prompt.
        skipped = prompt_length if self.repetition == 1 else 0
        distinct, inverse = np.unique(tokens[skipped:], return_inverse=True)
        generated = np.bincount(inverse[prompt_length - skipped :], minlength=len(distinct))
        self._size = len(distinct)
        self._tokens = distinct.astype(np.int64)
        self._counts = generated.astype(np.float32)
        self._index = {int(token): i for i, token in enumerate(distinct)}

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: self._size]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self._size]

    def record(self, token: int) -> None:
        at = self._index.setdefault(token, self._size)
        if at == self._size:
            if at == len(self._tokens):
                room = max(64, at)
                self._tokens = np.concatenate((self._tokens, np.zeros(room, np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
            self._tokens[at], self._counts[at] = token, 0
            self._size += 1
        self._counts[at] += 1


class Adjustments:
    """The adjustments of every slot that asks for any."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._edits: dict[int, _Edits] = {}
        self._histories: dict[int, _History] = {}

    def start(self, slot: int, sampling: Sampling, tokens: np.ndarray, prompt_length: int) -> None:
        """A sequence takes a slot; `tokens` int32 [prompt and generated]."""
        self.end(slot)
        if sampling.logit_bias or (sampling.barred and sampling.barred_before > prompt_length):
            self._edits[slot] = _Edits(
                np.fromiter(sampling.logit_bias.keys(), np.int64),
                np.fromiter(sampling.logit_bias.values(), np.float32),
                np.array(sampling.barred, np.int64),
                sampling.barred_before,
            )
        penalties = (sampling.presence_penalty, sampling.frequency_penalty)
        if sampling.repetition_penalty != 1 or any(penalties):
            self._histories[slot] = _History(sampling, tokens, prompt_length)

    def end(self, slot: int) -> None:
        self._edits.pop(slot, None)
        self._histories.pop(slot, None)

    def record(self, slots: Ids, tokens: Sequence[int]) -> None:
        """`tokens[i]` was generated for `slots[i]`."""
        if self._histories:
            for slot, token in zip(slots, tokens, strict=True):
                if slot in self._histories:
                    self._histories[slot].record(token)

    def apply(self, logits_SV: torch.Tensor, slots: Ids, positions: Ids) -> torch.Tensor:
        """The adjusted logits; `logits_SV` itself, untouched, where no slot adjusts anything."""
        edits = [(row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._edits]
        histories = [
            (row, self._histories[slot])
            for row, slot in enumerate(slots)
            if slot in self._histories
        ]
        if not edits and not histories:
            return logits_SV
        logits_SV = logits_SV.clone()
        self._edit(logits_SV, edits, positions)
        self._penalise(logits_SV, histories)
        return logits_SV

    def _edit(
        self, logits_SV: torch.Tensor, edits: list[tuple[int, _Edits]], positions: Ids
    ) -> None:
        biased = [(row, edit.bias_tokens) for row, edit in edits if len(edit.bias_tokens)]
        if biased:
            values = np.concatenate([edit.bias_values for _, edit in edits])
            logits_SV[self._pairs(biased)] += self._move(values)
        barred = [(row, edit.barred) for row, edit in edits if positions[row] < edit.barred_before]
        if barred:
            logits_SV[self._pairs(barred)] = -torch.inf

    def _penalise(self, logits_SV: torch.Tensor, histories: list[tuple[int, _History]]) -> None:
        """Repetition (arXiv:1909.05858): positive logits of tokens seen are divided, negative ones
        multiplied. Then presence is subtracted once, frequency once per time generated."""
        if not histories:
            return
        at = self._pairs([(row, history.tokens) for row, history in histories])
        parameters = np.array(
            [(h.repetition, h.presence, h.frequency) for _, h in histories], np.float32
        )
        lengths = [len(history.tokens) for _, history in histories]
        repetition_N, presence_N, frequency_N = self._move(np.repeat(parameters, lengths, axis=0).T)
        counts_N = self._move(np.concatenate([history.counts for _, history in histories]))
        x_N = logits_SV[at]
        x_N = torch.where(x_N < 0, x_N * repetition_N, x_N / repetition_N)
        logits_SV[at] = x_N - frequency_N * counts_N - presence_N * (counts_N > 0)

    def _pairs(self, rows: list[tuple[int, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and token indices, int64 [N] each, of every token named for a row."""
        lengths = [len(tokens) for _, tokens in rows]
        row_N = np.repeat(np.array([row for row, _ in rows], np.int64), lengths)
        return self._move(row_N), self._move(np.concatenate([tokens for _, tokens in rows]))

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
