"""FlashInfer's fused kernels are asked for what PyTorch's would compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shards.kernels.base import Norm
from shards.kernels.cuda.elementwise import FusedElementwise, TorchElementwise, elementwise
from shards.models.spec import Activation
from tests.unit.cuda_ranks import CPU, install


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: A002
    return input * (input.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:  # noqa: A002
    assert input.shape[-1] * input.itemsize % 16 == 0
    gate, up = input.chunk(2, -1)
    return F.silu(gate) * up


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Complex multiplication, so that it shares no line with what it is compared to."""
    assert cos_sin_cache.dtype == torch.float32
    cos, sin = cos_sin_cache[positions].chunk(2, -1)
    turn, dim = torch.complex(cos, sin)[:, None], cos_sin_cache.shape[1]
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)[..., :dim]  # fails on anything but a view
        pairs = heads.unflatten(-1, (2, -1)).mT if is_neox else heads.unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        heads.copy_((turned.mT if is_neox else turned).flatten(-2))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> FusedElementwise:
    install(
        monkeypatch,
        "flashinfer",
        rmsnorm=rmsnorm,
        silu_and_mul=silu_and_mul,
        apply_rope_with_cos_sin_cache_inplace=apply_rope_with_cos_sin_cache_inplace,
    )
    return FusedElementwise()


@pytest.mark.parametrize(
    "norm",
    [
        Norm("rms", 1e-5, torch.rand(24)),
        Norm("rms", 1e-5, torch.rand(24), torch.rand(24)),
        Norm("layer", 1e-5, torch.rand(24), torch.rand(24)),
    ],
)
def test_norms(fused: FusedElementwise, norm: Norm) -> None:
    x = torch.randn(5, 24)
    torch.testing.assert_close(fused.norm(x, norm), TorchElementwise().norm(x, norm))


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("relu", True), ("silu", False)])
@pytest.mark.parametrize("channels", [32, 31])  # rows of whole 16 bytes, and not
def test_activations(
    fused: FusedElementwise, activation: Activation, gated: bool, channels: int
) -> None:
    h = torch.randn(5, 2 * channels)
    expected = TorchElementwise().activate(h, activation, gated)
    torch.testing.assert_close(fused.activate(h, activation, gated), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (64, 32), (80, 80)])
def test_rotations(fused: FusedElementwise, interleaved: bool, head_dim: int, dim: int) -> None:
    joined = torch.randn(5, 3 + 1 + 1, head_dim)  # queries, keys and values of a row, as projected
    angle = torch.randn(5, dim // 2)
    angles = torch.cat((angle.cos(), angle.sin()), -1)
    q, k, v = joined.split((3, 1, 1), 1)
    expected = TorchElementwise().rotate(q.clone(), k.clone(), angles, interleaved)
    values = v.clone()
    found = fused.rotate(q, k, angles, interleaved)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(v, values)


def test_off_the_gpu_torch_computes(fused: FusedElementwise) -> None:
    assert type(elementwise(CPU, torch.bfloat16)) is TorchElementwise
    assert type(elementwise(torch.device("cuda"), torch.float32)) is TorchElementwise
    assert type(elementwise(torch.device("cuda"), torch.bfloat16)) is FusedElementwise
