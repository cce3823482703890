"""Position encodings: rotary angles for the attention, and learned tables for the embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from shards.models.spec import (
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    Scaling,
    YarnScaling,
)


def _scaled(inverse: torch.Tensor, rotary: Rotary, scaling: Scaling) -> torch.Tensor:
    """Inverse frequencies [dim/2] stretched for a context longer than the training one."""
    match scaling:
        case LinearScaling(factor):
            return inverse / factor
        case Llama3Scaling(factor, low, high, original):
            wavelength = 2 * math.pi / inverse
            smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - smooth) * inverse / factor + smooth * inverse
        case YarnScaling():

            def turns_to_channel(turns: float) -> float:
                ratio = scaling.original_context / (turns * 2 * math.pi)
                return rotary.dim * math.log(ratio) / (2 * math.log(rotary.theta))

            low, high = turns_to_channel(scaling.beta_fast), turns_to_channel(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotary.dim - 1)
            channel = torch.arange(rotary.dim // 2, dtype=torch.float32, device=inverse.device)
            ramp = ((channel - low) / max(high - low, 0.001)).clamp(0, 1)
            return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def inverse_frequencies(rotary: Rotary, device: torch.device) -> torch.Tensor:
    """theta^(-2i/dim) for i in [0, dim/2), scaled; float32 [dim/2]."""
    exponent = torch.arange(0, rotary.dim, 2, dtype=torch.float32, device=device) / rotary.dim
    inverse = 1.0 / rotary.theta**exponent
    return inverse if rotary.scaling is None else _scaled(inverse, rotary, rotary.scaling)


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines of a step's positions, [T, 1, dim/2], shared by every layer."""

    cos: torch.Tensor
    sin: torch.Tensor
    dim: int
    interleaved: bool

    def rotate(self, x_TNH: torch.Tensor) -> torch.Tensor:
        """Turn the first `dim` channels of every head by its position's angles."""
        turned, rest = x_TNH[..., : self.dim], x_TNH[..., self.dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        parts = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        turned = (
            torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        )
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def angles(rotary: Rotary, positions_T: torch.Tensor, dtype: torch.dtype) -> Angles:
    """Computed in float32, for any position, without a table as long as the context."""
    inverse = inverse_frequencies(rotary, positions_T.device)
    angle = positions_T[:, None, None].float() * inverse
    factor = rotary.scaling.attention_factor if isinstance(rotary.scaling, YarnScaling) else 1.0
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return Angles(cos, sin, rotary.dim, rotary.interleaved)


class PositionTable(nn.Module):
    """Learned absolute positions, replicated."""

    def __init__(self, width: int, positions: LearnedPositions) -> None:
        super().__init__()
        self.offset = positions.offset
        self.weight = nn.Parameter(torch.empty(positions.rows, width))

    def forward(self, positions_T: torch.Tensor) -> torch.Tensor:
        return self.weight[positions_T + self.offset]
