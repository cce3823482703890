"""The one order in which ranks are added."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ordered_sum(terms: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """terms[0] + terms[1] + ..., from left to right, as a new tensor of the type it is held in.

    That is float64 for float64 and float32 for all others: 16-bit types are to be rounded once, by
    whoever stores the result.
    """
    wide = torch.float64 if terms[0].dtype == torch.float64 else torch.float32
    total = terms[0].to(wide, copy=True)
    for term in terms[1:]:
        total += term
    return total
