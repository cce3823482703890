"""Log probabilities of tokens and of the most probable alternatives, as the client sees them.

Shapes: R rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards.contract import Logprobs
from shards.sampling.truncation import first_of_ties


def token_logprobs(
    logits_RV: torch.Tensor, tokens: Sequence[int], top_n: Sequence[int]
) -> list[Logprobs]:
    """For each row `tokens[r]` and the `top_n[r]` most probable tokens, ties by lower id.

    `logits_RV` float32, the model's own: before bias, penalties and temperature.
    """
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    token_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
    own_R1 = logits_RV.gather(-1, token_R1)
    ranks = ((logits_RV > own_R1).sum(-1) + 1).tolist()
    logprobs = logprobs_RV.gather(-1, token_R1).squeeze(-1).tolist()
    widest = min(max(top_n), logits_RV.shape[-1])
    top_RN = _most_probable(logits_RV, widest)
    top_tokens, top_logprobs = top_RN.tolist(), logprobs_RV.gather(-1, top_RN).tolist()
    return [
        Logprobs(
            int(tokens[r]),
            logprobs[r],
            ranks[r],
            tuple(top_tokens[r][: top_n[r]]),
            tuple(top_logprobs[r][: top_n[r]]),
        )
        for r in range(len(tokens))
    ]


def _most_probable(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [R, count]: ids of the largest logits, largest first, ties by lower id."""
    rows = logits_RV.shape[0]
    if count == 0:
        return torch.empty((rows, 0), dtype=torch.int64, device=logits_RV.device)
    least_R1 = logits_RV.topk(count).values[:, -1:]
    chosen_RV = first_of_ties(logits_RV, least_R1, torch.full_like(least_R1, count))
    # topk orders equal values as it likes; nonzero yields ids in order, and a stable sort keeps it.
    id_RN = chosen_RV.nonzero()[:, 1].reshape(rows, count)
    order_RN = logits_RV.gather(-1, id_RN).sort(dim=-1, descending=True, stable=True).indices
    return id_RN.gather(-1, order_RN)
