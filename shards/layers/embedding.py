"""Token embedding cut along vocabulary rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from shards.layout import Range


class Embedding(nn.Module):
    """Rows of the tokens that this rank owns, zero for the others: the sum over ranks is whole."""

    def __init__(self, rows: Range, vocabulary: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.whole = len(rows) == vocabulary
        self.weight = nn.Parameter(torch.empty(len(rows), width))

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.whole:
            return F.embedding(tokens_T, self.weight)
        foreign_T = (tokens_T < self.rows.start) | (tokens_T >= self.rows.stop)
        local_T = (tokens_T - self.rows.start).masked_fill_(foreign_T, 0)
        return F.embedding(local_T, self.weight).masked_fill_(foreign_T[:, None], 0)
