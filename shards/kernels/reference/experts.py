"""Routing tokens to experts, and the experts' answers, in plain PyTorch.

Shape letters: T tokens, E experts, G groups of them, X chosen experts of a token, D width,
P pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shards.models.spec import Router


def route(
    logits_TE: torch.Tensor, correction_E: torch.Tensor | None, choice: Router
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, int64 [T, X], and what they weigh, float32 [T, X]."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if choice.scores == "softmax" else logits_TE.sigmoid()
    ranked_TE = scores_TE if correction_E is None else scores_TE + correction_E.float()
    if choice.groups > 1:
        ranked_TE = ranked_TE.masked_fill(~_in_best_groups(ranked_TE, choice), float("-inf"))
    chosen_TX = ranked_TE.topk(choice.top_k, -1, sorted=False).indices
    weights_TX = scores_TE.gather(1, chosen_TX)
    if choice.renormalise:
        least = torch.finfo(weights_TX.dtype).tiny  # sigmoids may all round to 0
        weights_TX = weights_TX / weights_TX.sum(-1, keepdim=True).clamp(min=least)
    return chosen_TX, weights_TX * choice.scale


def _in_best_groups(ranked_TE: torch.Tensor, choice: Router) -> torch.Tensor:
    grouped = torch.unflatten(ranked_TE, 1, (choice.groups, -1))  # [T, G, E / G]
    counted = 2 if choice.group_score == "best two" else 1
    best_TG = grouped.topk(counted, -1).values.sum(-1)
    groups = best_TG.topk(choice.top_groups, -1, sorted=False).indices
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, groups, True)
    return kept_TG[:, :, None].expand_as(grouped).flatten(1)


def count_tokens(chosen_TX: torch.Tensor, load: torch.Tensor) -> None:
    """Add to `load`, int64 [E], how many tokens go to each expert."""
    chosen = chosen_TX.flatten()
    load.index_add_(0, chosen, torch.ones_like(chosen))


@dataclass(frozen=True, slots=True)
class Sorted:
    """The pairs of a step, sorted by expert: those of this rank's experts, then the others.

    As many pairs as the routing has, whatever it says. `tokens_P` are rows of x, `experts_P` places
    among this rank's experts (of the last one for pairs of others), `weights_P` float32 what an
    answer weighs (0 for pairs of others). `ends_E` int32: where each expert's pairs end.
    `order_P`: each pair's place before it was sorted, token by token, `chosen` to a token.
    """

    chosen: int
    order_P: torch.Tensor
    tokens_P: torch.Tensor
    experts_P: torch.Tensor
    weights_P: torch.Tensor
    ends_E: torch.Tensor

    @classmethod
    def of(
        cls, chosen_TX: torch.Tensor, weights_TX: torch.Tensor, first: int, count: int
    ) -> Sorted:
        """On a rank that holds the experts `first .. first + count`."""
        local_P = (chosen_TX - first).flatten()
        foreign_P = (local_P < 0) | (local_P >= count)
        sorted_P, order_P = local_P.masked_fill(foreign_P, count).sort(stable=True)
        places_E = torch.arange(count, device=local_P.device)
        return cls(
            chosen=chosen_TX.shape[1],
            order_P=order_P,
            tokens_P=order_P // chosen_TX.shape[1],
            experts_P=sorted_P.clamp(max=count - 1),
            weights_P=weights_TX.flatten().masked_fill(foreign_P, 0.0)[order_P],
            ends_E=torch.searchsorted(sorted_P, places_E, right=True, out_int32=True),
        )

    def gathered(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[P, D]: each pair's token."""
        return x_TD[self.tokens_P]

    def summed(self, y_PD: torch.Tensor) -> torch.Tensor:
        """[T, D]: each token's pairs, weighed. What weighs nothing may hold anything."""
        weights_P1 = self.weights_P[:, None].to(y_PD.dtype)
        weighed_PD = torch.where(weights_P1 == 0, 0, y_PD * weights_P1)
        # Put back and summed in that order, which adding by index would not keep on a GPU.
        in_order_PD = torch.empty_like(weighed_PD).index_copy_(0, self.order_P, weighed_PD)
        return in_order_PD.view(-1, self.chosen, y_PD.shape[1]).sum(1)


def expert_by_expert(
    x_PD: torch.Tensor,
    ends_E: torch.Tensor,
    width: int,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[P, width]: `expert(e, rows)` for the rows of each expert that has any; zeros behind them."""
    out = x_PD.new_zeros(len(x_PD), width)
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            out[start:end] = expert(e, x_PD[start:end])
        start = end
    return out
