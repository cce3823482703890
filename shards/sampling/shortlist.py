"""The few tokens of a rank's vocabulary slice among which a greedy or top-k choice must fall.

Ranks hand these over instead of whole slices of logits. Shapes: S sequences, V vocabulary rows of
this rank, K tokens of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards.contract import Sampling
from shards.sampling.truncation import first_of_ties

LONGEST = 64


def width(sampling: Sampling) -> int:
    """How many tokens of every rank its sequences need; 0 where nothing less than all will do."""
    adjusted = (
        sampling.logit_bias
        or sampling.barred
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.grammar
    )
    if adjusted or sampling.logprobs >= 0:
        return 0
    if sampling.temperature == 0:
        return 1
    return sampling.top_k if 0 < sampling.top_k <= LONGEST else 0


def shortlist(logits_SV: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """float32 [S, 2 K]: the `count` largest logits of each row, and their token ids.

    `first` is the token id of column 0; K is `count`, or V where that is less. Ids rise. Among
    equal logits lower ids come first. NaN is handed over as infinity, which no sampler takes.
    """
    count = min(count, logits_SV.shape[1])
    if count == 1:
        # argmax takes NaN for the largest, and the first among equals.
        at_SK = logits_SV.argmax(-1, keepdim=True)
    else:
        logits_SV = logits_SV.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        least_S1 = logits_SV.topk(count).values[:, -1:]
        kept_SV = first_of_ties(logits_SV, least_S1, torch.full_like(least_S1, count).long())
        at_SK = kept_SV.nonzero()[:, 1].view(-1, count)
    # Token ids stay far below 2^24, up to which float32 counts exactly.
    values_SK = logits_SV.gather(-1, at_SK)
    return torch.cat((values_SK, (at_SK + first).to(values_SK.dtype)), -1)


def join(lists: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's list, side by side, `widths` wide each -> logits and token ids, [S, all K]."""
    parts = torch.split(lists, list(widths), -1)
    halves = [part.chunk(2, -1) for part in parts]
    logits = torch.cat([values for values, _ in halves], -1)
    return logits, torch.cat([ids for _, ids in halves], -1).long()
