"""Rotary position embeddings: inverse frequencies, scaled as the model was trained."""

from __future__ import annotations

import math

import torch

from shards.kernels.base import Rotation
from shards.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)


def _scaled(inverse: torch.Tensor, rotary: Rotary, scaling: Scaling, context: int) -> torch.Tensor:
    """Inverse frequencies [dim/2] stretched for a context longer than the training one."""
    match scaling:
        case LinearScaling(factor):
            return inverse / factor
        case Llama3Scaling(factor, low, high, original):
            wavelength = 2 * math.pi / inverse
            smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - smooth) * inverse / factor + smooth * inverse
        case LongRopeScaling(short, long, original, _):
            return inverse / inverse.new_tensor(long if context > original else short)
        case YarnScaling():

            def turns_to_channel(turns: float) -> float:
                ratio = scaling.original_context / (turns * 2 * math.pi)
                return rotary.dim * math.log(ratio) / (2 * math.log(rotary.theta))

            low, high = turns_to_channel(scaling.beta_fast), turns_to_channel(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotary.dim - 1)
            channel = torch.arange(rotary.dim // 2, dtype=torch.float32, device=inverse.device)
            # Contexts of a few tokens have their borders the wrong way round: nothing is stretched.
            ramp = ((channel - low) / ((high - low) or 0.001)).clamp(0, 1)
            return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def inverse_frequencies(rotary: Rotary, context: int, device: torch.device) -> torch.Tensor:
    """theta^(-2i/dim) for i in [0, dim/2), scaled; float32 [dim/2]."""
    exponent = torch.arange(0, rotary.dim, 2, dtype=torch.float32, device=device) / rotary.dim
    inverse = 1.0 / rotary.theta**exponent
    if rotary.scaling is None:
        return inverse
    return _scaled(inverse, rotary, rotary.scaling, context)


def rotation_of(rotary: Rotary, context: int, device: torch.device | None = None) -> Rotation:
    """What kernels are told of a rotary embedding: angles for any position, without a table as
    long as the `context` that is served."""
    scaling = rotary.scaling
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
    inverse = inverse_frequencies(rotary, context, device or torch.device("cpu"))
    return Rotation(inverse, rotary.interleaved, factor)
