"""RMSNorm and LayerNorm, replicated on every rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from shards.models import spec


class Norm(nn.Module):
    """Statistics in float32 whatever the activations' dtype."""

    def __init__(self, width: int, norm: spec.Norm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.rms = norm.kind == "rms"
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if norm.bias else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        if not self.rms:
            return F.layer_norm(x_TD, shape, self.weight, self.bias, self.eps)
        normed_TD = self.weight * F.rms_norm(x_TD.float(), shape, None, self.eps).to(x_TD.dtype)
        return normed_TD if self.bias is None else normed_TD + self.bias
