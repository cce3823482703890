"""Column- and row-parallel linear layers (arXiv:1909.08053), for ranks of any, unequal, width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ColumnLinear(nn.Module):
    """This rank's outputs of a linear layer whose input is replicated. No communication."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD, self.weight, self.bias)


class RowLinear(nn.Module):
    """This rank's summand of a linear layer whose input is split: all-reduce, then `finish`."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_TN: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TN, self.weight)

    def finish(self, sum_TD: torch.Tensor) -> torch.Tensor:
        """Add the bias to the reduced sum: once, not once per rank."""
        return sum_TD if self.bias is None else sum_TD + self.bias
