"""Codes, scales and minima: GGUF's blocks as they are, floats as near as a scheme allows."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from shards.quantization.gguf import lower
from shards.quantization.packing import pack, unpack
from shards.quantization.quantize import quantize
from shards.quantization.scheme import GGUF_SCHEMES, INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor
from tests.models import quantised_blocks

SCHEMES = (INT8, INT6, INT4, INT4_MINIMUM)
ROWS, INPUTS = 24, 768

by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(blocks: npt.NDArray[np.uint8], dtype: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype]))


def squared_error(found: torch.Tensor, original: torch.Tensor) -> float:
    return float((found - original).square().sum() / original.square().sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packing_is_undone_by_unpacking(bits: int) -> None:
    drawn = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8)
    packed = pack(drawn, bits)
    assert packed.shape == (5, 96 * bits // 8)
    assert torch.equal(unpack(packed, bits), drawn)


def test_the_order_of_packed_codes() -> None:
    """As documented, since kernels read it."""
    codes = (torch.arange(32, dtype=torch.uint8) * 2)[None]
    nibbles = pack(codes & 15, 4)[0]
    assert nibbles[3] == (3 * 2) | ((19 * 2) & 15) << 4
    both = pack(codes, 6)[0]
    assert torch.equal(both[:16], nibbles)
    high = [int(codes[0, j]) >> 4 for j in (5, 13, 21, 29)]
    assert both[16 + 5] == high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6


@pytest.mark.parametrize("dtype", GGUF_SCHEMES)
def test_gguf_blocks_mean_what_gguf_says(dtype: str) -> None:
    """Exactly where the file's scales are float16; K-quants within a rounding of theirs."""
    blocks = quantised_blocks(weight(ROWS, INPUTS).numpy(), dtype)
    found, expected = lower(blocks, dtype), dequantized(blocks, dtype)
    assert found.scheme is GGUF_SCHEMES[dtype]
    assert found.shape == expected.shape
    assert found.nbytes == found.scheme.bytes_of(ROWS, INPUTS)
    if dtype.endswith("_K"):
        codes = 1 << (found.scheme.bits - int(found.minima is None))
        reach = codes * found.scales.abs().float()
        if found.minima is not None:
            reach += found.minima.abs().float()
        bound = reach.repeat_interleave(found.scheme.group, 1) * 2**-11 + codes * 2**-25
        assert ((found.dequantize() - expected).abs() <= bound).all()
    else:
        assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("dtype", GGUF_SCHEMES)
def test_cuts_are_those_of_the_whole(dtype: str) -> None:
    whole = lower(quantised_blocks(weight(ROWS, INPUTS).numpy(), dtype), dtype)
    cut = whole.rows(5, 17).columns(32, 416)
    assert cut.shape == (12, 384)
    assert torch.equal(cut.dequantize(), whole.dequantize()[5:17, 32:416])


def test_a_cut_inside_a_block_is_refused() -> None:
    whole = QuantizedTensor.empty(INT6, 2, 64)
    with pytest.raises(ValueError, match=r"inputs 16 to 64 .* multiples of 32 only"):
        whole.columns(16, 64)
    with pytest.raises(ValueError, match="inputs 0 to 80"):
        QuantizedTensor.empty(INT8, 2, 80)


@by_name
def test_every_weight_has_the_nearest_code(scheme: Scheme) -> None:
    original = weight(200, 96)
    found = quantize(original, scheme)
    steps = found.scales.abs().float().repeat_interleave(scheme.group, 1)
    error = (found.dequantize() - original).abs()
    off = error > 0.5001 * steps
    # Only the outermost weights of a group may have been clipped, a step or so.
    assert off.float().mean() < (0.0 if scheme.bits == 8 else 0.1) + 1e-9
    assert (error <= 2 * steps).all()
    assert found.nbytes == scheme.bytes_of(200, 96)


@pytest.mark.parametrize(("scheme", "dtype"), [(INT4, "Q4_0"), (INT4_MINIMUM, "Q4_1")])
@pytest.mark.parametrize("tail", ["normal", "laplace"])
def test_four_bits_come_nearer_than_ggufs_own(scheme: Scheme, dtype: str, tail: str) -> None:
    original = weight(400, 256)
    if tail == "laplace":
        original *= weight(400, 256, seed=1).abs()
    kind = gguf.GGMLQuantizationType[dtype]
    theirs = dequantized(gguf.quants.quantize(original.numpy(), kind), dtype)
    ours = quantize(original, scheme).dequantize()
    assert squared_error(ours, original) < 0.97 * squared_error(theirs, original)


@pytest.mark.parametrize("dtype", ["Q4_1", "Q8_0"])
def test_what_was_quantised_comes_back(dtype: str) -> None:
    """Its own grid is the best that can be found for it."""
    before = lower(quantised_blocks(weight(ROWS, INPUTS).numpy(), dtype), dtype).dequantize()
    again = quantize(before, GGUF_SCHEMES[dtype]).dequantize()
    assert squared_error(again, before) < 1e-6


@by_name
@pytest.mark.parametrize("value", [0.0, 0.375, -2.0])
def test_equal_weights_keep_their_value(scheme: Scheme, value: float) -> None:
    found = quantize(torch.full((3, 64), value), scheme).dequantize()
    assert found.isfinite().all()
    assert torch.allclose(found, torch.full((3, 64), value), rtol=1e-3)


@by_name
@pytest.mark.parametrize("bad", [1e9, float("nan"), float("inf")])
def test_what_cannot_be_held_shows_in_scale_or_minimum(scheme: Scheme, bad: float) -> None:
    original = weight(2, 64)
    original[1, 40] = bad
    _, *scaling = quantize(original, scheme).planes
    finite = torch.stack(scaling).isfinite()
    assert not finite[:, 1].all()
    assert finite[:, 0].all()


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_taken_and_given(scheme: Scheme, dtype: torch.dtype) -> None:
    original = weight(4, 64).to(dtype)
    found = quantize(original, scheme)
    assert torch.equal(found.codes, quantize(original.float(), scheme).codes)
    assert torch.equal(found.dequantize(dtype), found.dequantize().to(dtype))
