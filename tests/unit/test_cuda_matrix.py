"""Weights as the CUDA set holds them mean what they meant before."""

from __future__ import annotations

import pytest
import torch

from shards.kernels.cuda import CudaKernels, int4
from shards.kernels.cuda.float8 import Float8Matrix
from shards.kernels.cuda.int4 import Int4Matrix, paired_codes, scales_and_zeros
from shards.kernels.cuda.matrix import DenseMatrix, GroupedMatrix, SideBySide
from shards.quantization.packing import pack
from shards.quantization.scheme import INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor

CPU = torch.device("cpu")
SCHEMES = pytest.mark.parametrize("scheme", [INT8, INT6, INT4, INT4_MINIMUM], ids=lambda s: s.name)


def drawn(scheme: Scheme, rows: int = 10, inputs: int = 64, seed: int = 1) -> QuantizedTensor:
    """Every code, scales and minima of all signs and sizes."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << scheme.bits, (rows, inputs), generator=random)
    scales = torch.randn(rows, inputs // scheme.group, generator=random).half()
    minima = torch.randn(scales.shape, generator=random).half() if scheme.has_minimum else None
    return QuantizedTensor(scheme, pack(codes.to(torch.uint8), scheme.bits), scales, minima)


@SCHEMES
@pytest.mark.parametrize("rows", [1, 5])
def test_codes_are_widened_exactly(scheme: Scheme, rows: int) -> None:
    parts = [drawn(scheme, seed=1), drawn(scheme, rows=3, seed=2)]
    wide = torch.cat([part.dequantize() for part in parts])
    matrix = CudaKernels(CPU, torch.float32).pack(parts)
    assert isinstance(matrix, GroupedMatrix)
    assert (matrix.outputs, matrix.inputs) == wide.shape
    x = torch.randn(rows, 64)
    expected = x @ wide.T
    torch.testing.assert_close(matrix.apply(x), expected, rtol=0, atol=1e-6 * expected.abs().max())
    at = torch.tensor([12, 0, 7])
    assert torch.equal(matrix.rows(at), wide[at])


def test_different_forms_lie_side_by_side() -> None:
    dense = torch.randn(4, 64)
    parts = [drawn(INT8), dense, drawn(INT6)]
    wide = torch.cat([parts[0].dequantize(), dense, parts[2].dequantize()])
    matrix = CudaKernels(CPU, torch.float32).pack(parts)
    assert isinstance(matrix, SideBySide)
    assert (matrix.outputs, matrix.inputs) == wide.shape
    x = torch.randn(3, 64)
    expected = x @ wide.T
    torch.testing.assert_close(matrix.apply(x), expected, rtol=0, atol=1e-6 * expected.abs().max())
    assert matrix.nbytes == sum(part.nbytes for part in matrix.parts) > 0


@pytest.mark.parametrize("scheme", [INT4, INT4_MINIMUM], ids=lambda s: s.name)
def test_int4_scales_and_zeros_count_from_8(scheme: Scheme) -> None:
    """What `torch._weight_int4pack_mm` computes from them is the weight, up to bfloat16 scales."""
    weight = drawn(scheme)
    pairs = paired_codes(weight)
    both = scales_and_zeros(weight)
    assert pairs.shape == (16, 32)
    assert both.shape == (2, 16, 2)
    codes = torch.stack((pairs >> 4, pairs & 0x0F), -1).flatten(1)
    scale, zero = (plane.T.repeat_interleave(32, 1).float() for plane in both.unbind(-1))
    meant = (codes.float() - 8) * scale + zero
    assert not meant[10:].any()
    # Both were rounded by up to 2^-9, and |zero| is at most 8 |scale| + |minimum|.
    bound = 2**-8 * (16 * scale.abs() + zero.abs())[:10]
    assert ((meant[:10] - weight.dequantize()).abs() <= bound).all()


def test_int4_keeps_plain_codes_only_for_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "tile_codes", paired_codes)  # the kernel itself is CUDA's
    monkeypatch.setattr(torch, "_weight_int4pack_mm", _int4_matmul)
    weight = drawn(INT4)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = x.float() @ weight.dequantize().T

    linear = Int4Matrix(weight)
    assert linear.apply(x).shape == (3, 10)
    torch.testing.assert_close(linear.apply(x).float(), expected, atol=0.05, rtol=0.02)
    tiled_bytes = linear.nbytes
    with pytest.raises(RuntimeError, match="no longer there"):
        linear.rows(torch.tensor([0]))

    tied = Int4Matrix(weight)
    at = torch.tensor([9, 2])
    assert torch.equal(tied.rows(at), weight.dequantize(torch.bfloat16)[at])
    tied.apply(x)
    assert torch.equal(tied.rows(at), weight.dequantize(torch.bfloat16)[at])
    assert tied.nbytes == tiled_bytes + weight.nbytes


def _int4_matmul(
    x: torch.Tensor, pairs: torch.Tensor, group: int, both: torch.Tensor
) -> torch.Tensor:
    codes = torch.stack((pairs >> 4, pairs & 0x0F), -1).flatten(1).float()
    scale, zero = (plane.T.repeat_interleave(group, 1).float() for plane in both.unbind(-1))
    return (x.float() @ ((codes - 8) * scale + zero).T).bfloat16()


def test_off_the_gpu_4_bits_are_widened_like_others() -> None:
    assert not int4.fits(drawn(INT4), torch.bfloat16)
    assert isinstance(CudaKernels(CPU, torch.bfloat16).pack([drawn(INT4)]), GroupedMatrix)


def test_float8_rounds_to_3_bits() -> None:
    kernels = CudaKernels(CPU, torch.bfloat16, quantize_to_float8=True)
    weight, x = torch.randn(48, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    weight[3], x[2] = 0, 0
    matrix = kernels.pack([weight[:16], weight[16:]])
    assert isinstance(matrix, Float8Matrix)
    assert matrix.nbytes == 48 * 64 + 48 * 4
    # Each factor is off by up to 2^-4 of itself, and errors of 64 terms partly cancel.
    expected = x.float() @ weight.float().T
    assert (matrix.apply(x).float() - expected).abs().max() < expected.abs().max() * 2**-4
    assert not matrix.apply(x)[2].any()
    rows = matrix.rows(torch.arange(48)).float()
    assert ((rows - weight.float()).abs() <= weight.float().abs() * 2**-4 + 1e-3).all()


def test_float8_leaves_awkward_shapes_as_they_are() -> None:
    kernels = CudaKernels(CPU, torch.bfloat16, quantize_to_float8=True)
    assert isinstance(kernels.pack([torch.randn(50, 64).bfloat16()]), DenseMatrix)
    assert isinstance(kernels.pack([torch.randn(48, 40).bfloat16()]), DenseMatrix)
