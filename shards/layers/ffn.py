"""Feed-forward layers: this rank's channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from shards.layers.linear import ColumnLinear, RowLinear
from shards.models import spec

ACTIVATIONS: dict[spec.Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """down(act(up(x))), with a gate where the spec has one (arXiv:2002.05202)."""

    def __init__(self, width: int, ffn: spec.FeedForward, channels: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[ffn.activation]
        self.gate = ColumnLinear(width, channels, ffn.bias) if ffn.gated else None
        self.up = ColumnLinear(width, channels, ffn.bias)
        self.down = RowLinear(channels, width, ffn.bias)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """This rank's summand of the output, [T, D]."""
        up_TF = self.up(x_TD)
        if self.gate is None:
            return self.down(self.activation(up_TF))
        return self.down(self.activation(self.gate(x_TD)) * up_TF)
