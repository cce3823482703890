"""Norms, rotations and activations: PyTorch's kernels, or FlashInfer's fused ones.

Nothing here is compiled: inside a graph a launch costs next to nothing, and outside of one, in a
prefill, the matmuls cost most.

Shape letters: T rows, D width, N query heads, K KV heads, H head_dim, F FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F

from shards.kernels.base import Norm
from shards.kernels.cuda.attention.flashinfer import LIBRARY
from shards.models.spec import Activation

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

# FlashInfer's kernels for gated ones, and what the bytes of their rows are multiples of.
_FUSED_GATED: dict[Activation, str] = {
    "silu": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "gelu_tanh": "gelu_tanh_and_mul",
}
_ROW_BYTES = 16
_ROTATED_HEAD_DIMS = (64, 128, 256, 512)


class Elementwise(Protocol):
    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor: ...

    def activate(self, h: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
        """act(gate) * up of [T, 2 F], gate first, where gated; else act of [T, F]."""
        ...

    def rotate(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, angles: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys rotated by `angles`; may overwrite them.

        `angles` float32 [T, dim]: the cosines of dim / 2 channel pairs, then their sines. The
        channels from `dim` on stay.
        """
        ...


def elementwise(device: torch.device, dtype: torch.dtype) -> Elementwise:
    """FlashInfer's where it is installed and computes in `dtype`."""
    fused = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return FusedElementwise() if fused and find_spec(LIBRARY) else TorchElementwise()


class TorchElementwise:
    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        shape = norm.weight.shape
        if norm.kind == "layer":
            return F.layer_norm(x_TD, shape, norm.weight, norm.bias, norm.eps)
        normed_TD = F.rms_norm(x_TD, shape, norm.weight, norm.eps)
        return normed_TD if norm.bias is None else normed_TD + norm.bias

    def activate(self, h: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
        if not gated:
            return _ACTIVATIONS[activation](h)
        gate_TF, up_TF = h.chunk(2, -1)
        return _ACTIVATIONS[activation](gate_TF) * up_TF

    def rotate(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, angles: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = angles[:, None].to(q_TNH.dtype).chunk(2, -1)
        return _rotated(q_TNH, cos, sin, interleaved), _rotated(k_TKH, cos, sin, interleaved)


def _rotated(
    x_TNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    dim = 2 * cos.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class FusedElementwise(TorchElementwise):
    """FlashInfer's kernels for what they cover, PyTorch's for the rest."""

    def __init__(self) -> None:
        self._flashinfer = import_module(LIBRARY)

    def norm(self, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.kind == "rms" and norm.bias is None:
            normed_TD: torch.Tensor = self._flashinfer.rmsnorm(x_TD, norm.weight, norm.eps)
            return normed_TD
        return super().norm(x_TD, norm)

    def activate(self, h: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
        kernel = _FUSED_GATED.get(activation) if gated else None
        if kernel is None or h.shape[-1] // 2 * h.itemsize % _ROW_BYTES:
            return super().activate(h, activation, gated)
        activated: torch.Tensor = getattr(self._flashinfer, kernel)(h)
        return activated

    def rotate(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, angles: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, head_dim = q_TNH.shape
        if head_dim not in _ROTATED_HEAD_DIMS:
            return super().rotate(q_TNH, k_TKH, angles, interleaved)
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(
            torch.arange(rows, device=angles.device),  # the angles are those of the rows
            q_TNH.flatten(1),  # views: the heads of a row lie together
            k_TKH.flatten(1),
            head_dim,
            angles,
            is_neox=not interleaved,
        )
        return q_TNH, k_TKH
