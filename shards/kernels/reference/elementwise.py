"""Norms, rotations and gates in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from shards.collectives.base import Collective
from shards.kernels.base import Gating, HeadNorms, Joint, Norm, Rotation
from shards.models.spec import Activation

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def norm(x_TD: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """x itself where there is none."""
    if norm is None:
        return x_TD
    shape = norm.weight.shape
    if norm.kind == "layer":
        return F.layer_norm(x_TD, shape, norm.weight, norm.bias, norm.eps)
    normed_TD = norm.weight * F.rms_norm(x_TD.float(), shape, None, norm.eps).to(x_TD.dtype)
    return normed_TD if norm.bias is None else normed_TD + norm.bias


def norm_heads(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, norms: HeadNorms, collective: Collective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys normed; one all-reduce of two numbers a token where they are joint."""
    if norms.joint is None:
        return _norm_each(q_TNH, norms.q), _norm_each(k_TKH, norms.k)
    mean_T2 = _mean_squares(q_TNH, k_TKH, norms.joint, collective)
    found = []
    for x, of_heads, mean_T in ((q_TNH, norms.q, mean_T2[:, 0]), (k_TKH, norms.k, mean_T2[:, 1])):
        scale_T11 = torch.rsqrt(mean_T + of_heads.eps)[:, None, None]
        weight_NH = of_heads.weight.view(-1, x.shape[2])
        found.append(weight_NH * (x.float() * scale_T11).to(x.dtype))
    return found[0], found[1]


def _norm_each(x_TNH: torch.Tensor, of_heads: Norm) -> torch.Tensor:
    heads, head_dim = x_TNH.shape[1:]
    if of_heads.weight.numel() == head_dim:
        return norm(x_TNH, of_heads)
    ones = torch.ones(head_dim, dtype=x_TNH.dtype, device=x_TNH.device)
    normed_TNH = norm(x_TNH, Norm(of_heads.kind, of_heads.eps, ones))
    normed_TNH = normed_TNH * of_heads.weight.view(heads, head_dim)
    return normed_TNH if of_heads.bias is None else normed_TNH + of_heads.bias.view(heads, head_dim)


def _mean_squares(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, joint: Joint, collective: Collective
) -> torch.Tensor:
    """float32 [T, 2]: over the query channels of all ranks, and over the key channels."""
    own = (q_TNH, k_TKH[:, joint.copies :])
    sums_T2 = torch.stack([x.float().square().sum((1, 2)) for x in own], 1)
    channels = torch.tensor(
        (joint.q_channels, joint.k_channels), dtype=sums_T2.dtype, device=sums_T2.device
    )
    return collective.all_reduce(sums_T2) / channels


def gate(h: torch.Tensor, gating: Gating) -> torch.Tensor:
    """[.., 2 F], gate first, or [.., F] -> [.., F]."""
    if not gating.gated:
        return _ACTIVATIONS[gating.activation](h)
    gate_F, up_F = h.chunk(2, -1)
    clamp = gating.clamp
    if clamp is None:
        return _ACTIVATIONS[gating.activation](gate_F) * up_F
    gate_F = gate_F.clamp(max=clamp.limit)
    up_F = up_F.clamp(-clamp.limit, clamp.limit)
    return (up_F + 1) * gate_F * torch.sigmoid(gate_F * clamp.alpha)


def angles(positions_T: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [T, 1, dim / 2]."""
    inverse = rotation.inverse.to(positions_T.device)
    angle = positions_T[:, None, None].float() * inverse
    return angle.cos() * rotation.factor, angle.sin() * rotation.factor


def rotate(
    x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The first channels of every head turned by what `angles` gives."""
    cos, sin = cos.to(x_TNH.dtype), sin.to(x_TNH.dtype)
    dim = 2 * cos.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def shape_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Scaled, then capped."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
