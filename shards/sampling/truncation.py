"""Which tokens may be drawn (top-k, top-p, min-p), and the draw among them.

Shapes: R sequences, V vocabulary, C the most probable candidates. A token's weight is its
probability over the most probable one's, exp((x - max) / temperature), and 0 once it is dropped.
Large tensors are changed in place: on a CPU the page faults of fresh ones cost several times the
arithmetic.
"""

from __future__ import annotations

import torch

# The likeliest tokens to sort for top-p, before trying more. They nearly always hold the mass, and
# finding them in 32 x 49152 takes 5 ms on one core where sorting everything takes 110.
CANDIDATES = 256
_MORE = 8


def first_of_ties(
    x_RV: torch.Tensor, least_R1: torch.Tensor, count_R1: torch.Tensor
) -> torch.Tensor:
    """bool [R, V]: the `count` largest values of each row, of which `least` is the smallest.

    Among equal values the lower token ids come first, so that the choice depends on the row alone.
    """
    above_RV = x_RV > least_R1
    tied_RV = x_RV == least_R1
    wanted_R1 = count_R1 - above_RV.sum(-1, keepdim=True)
    return above_RV | (tied_RV & (tied_RV.cumsum(-1, dtype=torch.int32) <= wanted_R1))


def truncate(
    weights_RV: torch.Tensor,
    x_RV: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    candidates: int = CANDIDATES,
) -> None:
    """Set the weights of all tokens that top-k and then top-p drop to 0.

    top-k keeps every token at least as probable as the k-th. top-p keeps the fewest tokens, most
    probable first, whose share of what top-k left reaches p. `top_k_R` int64 in 1..V, V is off;
    `top_p_R` float64 in (0, 1], 1 is off; `x_RV` are the logits that the weights were made of.
    `candidates` never changes the outcome.
    """
    vocabulary = x_RV.shape[-1]
    k_R1, p_R1 = top_k_R[:, None], top_p_R[:, None]
    limited_R1, nucleus_R1 = k_R1 < vocabulary, p_R1 < 1
    some_nucleus = bool(nucleus_R1.any())
    width = max(int(torch.where(limited_R1, k_R1, 1).max()), candidates if some_nucleus else 1)
    width = min(width, vocabulary)
    x_RC, token_RC = x_RV.topk(width)

    least_R1 = x_RC.gather(-1, (k_R1 - 1).clamp(max=width - 1))
    weights_RV.masked_fill_(limited_R1 & (x_RV < least_R1), 0)
    if not some_nucleus:
        return

    weights_RC = weights_RV.gather(-1, token_RC)
    mass_RC = weights_RC.double().cumsum_(-1)
    wanted_R1 = p_R1 * weights_RV.sum(-1, keepdim=True, dtype=torch.float64)
    short_R1 = nucleus_R1 & (mass_RC[:, -1:] < wanted_R1)
    short_R = short_R1.squeeze(-1)
    if width < vocabulary and bool(short_R.any()):
        again_RV = weights_RV[short_R]
        wider = candidates * _MORE
        truncate(again_RV, x_RV[short_R], top_k_R[short_R], top_p_R[short_R], wider)
        weights_RV[short_R] = again_RV
        nucleus_R1 &= ~short_R1
    # A token stays while the mass before it falls short. Clamped, because rounding can leave even
    # the whole mass short of p.
    count_R1 = ((mass_RC < wanted_R1).sum(-1, keepdim=True) + 1).clamp(max=width)
    least_R1 = x_RC.gather(-1, count_R1 - 1)
    weights_RV.masked_fill_(nucleus_R1 & ~first_of_ties(x_RV, least_R1, count_R1), 0)


def draw(
    x_RV: torch.Tensor,
    highest_R: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """One token id per row, int64 [R], by inverting the cumulative distribution at `uniform_R`.

    `x_RV` float32 logits after bias and penalties, `highest_R` each row's largest;
    `temperature_R`, `min_p_R` float32, `top_k_R` int64, `top_p_R` and `uniform_R` float64.
    The distribution is summed in vocabulary order in float64, so that a row's token depends neither
    on how the kept tokens were found nor on the rows beside it.
    """
    weights_RV = (x_RV - highest_R[:, None]).div_(temperature_R[:, None]).exp_()
    cut_R = (top_k_R < x_RV.shape[-1]) | (top_p_R < 1)
    if bool(cut_R.all()):
        truncate(weights_RV, x_RV, top_k_R, top_p_R)
    elif bool(cut_R.any()):
        cut_weights_RV = weights_RV[cut_R]
        truncate(cut_weights_RV, x_RV[cut_R], top_k_R[cut_R], top_p_R[cut_R])
        weights_RV[cut_R] = cut_weights_RV
    # The most probable token weighs 1, so min_p <= 1 always leaves one.
    weights_RV.masked_fill_(weights_RV < min_p_R[:, None], 0)
    cumulative_RV = weights_RV.double().cumsum_(-1)
    # As u <= 1 - 2^-53, the product rounds to less than the total: some kept token exceeds it.
    target_R = uniform_R * cumulative_RV[:, -1]
    return torch.searchsorted(cumulative_RV, target_R[:, None], right=True).squeeze(-1)
