"""Quantised weights widened in registers: what the dequantised weights give, and that no bit of a
row's result depends on other rows, on threads or on the processor's instructions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from shards.kernels.cpu.kernel import Header
from shards.kernels.cpu.linear_quantized import PackedQuantized, pack_quantized
from shards.kernels.cpu.linear_widened import linear
from shards.kernels.cpu.widened_tiles import TILE_ROWS
from shards.quantization.scheme import INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor
from tests.unit.kernel_launch import launch

SCHEMES = (INT8, INT6, INT4, INT4_MINIMUM)

each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def weights(scheme: Scheme, outputs: int, inputs: int) -> QuantizedTensor:
    """Every code there is, scales of both signs."""
    weight = QuantizedTensor.empty(scheme, outputs, inputs)
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight.codes.random_(0, 256, generator=generator)
    weight.scales.uniform_(-0.01, 0.01, generator=generator)
    if weight.minima is not None:
        weight.minima.uniform_(-0.1, 0.1, generator=generator)
    return weight


def activations(rows: int, inputs: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))


def multiply(packed: PackedQuantized, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    y = torch.full((len(x), packed.outputs), torch.nan)
    launch(linear(packed, x, y), threads, rows=len(x))
    return y


@each_scheme
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 49, 96), (1, 32, 32), (7, 70, 160), (31, 16, 64)]
)
def test_products_are_those_of_the_dequantised_weights(
    scheme: Scheme, rows: int, outputs: int, inputs: int
) -> None:
    weight, x = weights(scheme, outputs, inputs), activations(rows, inputs)
    # code * scale + minimum is two terms, each in a sum of its own.
    w, zero = weight.dequantize().double(), torch.zeros(())
    minima = zero if weight.minima is None else weight.minima.double().repeat_interleave(32, 1)
    size = x.double().abs() @ ((w - minima).abs() + minima.abs()).T
    # A term goes through one rounding for each of its group's 32 inputs and for each group after.
    roundings = 32 + 2 * inputs // scheme.group
    y = multiply(pack_quantized([weight]), x)
    assert ((y - x.double() @ w.T).abs() <= size * roundings * 2**-24).all()


@each_scheme
def test_every_code_is_widened_exactly(scheme: Scheme) -> None:
    """Each input alone, times scales that are powers of two: no rounding anywhere."""
    weight = weights(scheme, 70, 96)
    weight.scales.fill_(2**-7)
    if weight.minima is not None:
        weight.minima.fill_(-0.5)
    y = multiply(pack_quantized([weight]), torch.eye(96))
    assert torch.equal(y, weight.dequantize().T)


@each_scheme
def test_a_row_alone_or_in_a_batch_by_any_threads_has_the_same_bits(scheme: Scheme) -> None:
    packed, x = pack_quantized([weights(scheme, 113, 96)]), activations(31, 96)
    together = multiply(packed, x)
    for rows in range(1, TILE_ROWS + 2):
        assert torch.equal(together[:rows], multiply(packed, x[:rows].clone(), threads=3))
    assert torch.equal(together, torch.cat([multiply(packed, row) for row in x.split(1)]))


def test_more_rows_than_meet_the_weights_at_a_time() -> None:
    packed, x = pack_quantized([weights(INT4, 17, 4096)]), activations(60, 4096)
    assert torch.equal(multiply(packed, x)[41:], multiply(packed, x[41:].clone()))


def test_bias_and_addition_in_place_touch_the_steps_rows_of_a_slice_alone() -> None:
    weight, x, bias = weights(INT6, 49, 64), activations(9, 64), activations(1, 49)[0]
    packed = pack_quantized([weight])
    wide_x, wide_y = torch.full((9, 80), 7.0), torch.full((9, 60), 5.0)
    wide_x[:, 8:72] = x
    steps = linear(
        packed, wide_x[:, 8:72], wide_y[:, 3:52], bias=bias, rows=Header.SAMPLED, add=True
    )
    launch(steps, 3, rows=1, sampled=6)
    expected = torch.full((9, 60), 5.0)
    expected[:6, 3:52] = (multiply(packed, x)[:6] + bias) + 5.0
    assert torch.equal(wide_y, expected)


def test_weights_side_by_side() -> None:
    parts = [weights(INT4_MINIMUM, outputs, 64) for outputs in (20, 3, 300)]
    x = activations(3, 64)
    separate = torch.cat([multiply(pack_quantized([part]), x) for part in parts], 1)
    assert torch.equal(multiply(pack_quantized(parts), x), separate)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    packed, x = pack_quantized([weights(INT8, 16, 64)]), activations(8, 64)
    whole = multiply(packed, x)
    x[3, 40] = bad
    y = multiply(packed, x)
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 4, 5, 6, 7]], whole[[0, 1, 2, 4, 5, 6, 7]])


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_quantized([weights(INT8, 16, 64)])
    x, y = torch.empty(4, 64), torch.empty(4, 16)
    for arguments, message in (
        ((x[:, :32], y), r"x \[4, 32\] of torch.float32, .*: must be \[rows, 64\]"),
        ((x, y.double()), r"y \[4, 16\] of torch.float64, .*: must be \[rows, 16\]"),
        ((x, y.T.contiguous().T), r"strides \(1, 4\): .* each row contiguous"),
        ((x, y[:3]), r"x has 4 rows, y 3"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(packed, *arguments)
    with pytest.raises(ValueError, match=r"bias \[15\] does not fit 16 outputs"):
        linear(packed, x, y, bias=torch.zeros(15))


def digest() -> str:
    """Of what 6 bits and 4 bits with minima compute: together they unpack, scale and shift."""
    results = [
        multiply(pack_quantized([weights(scheme, 49, 96)]), activations(4, 96)).numpy().tobytes()
        for scheme in (INT6, INT4_MINIMUM)
    ]
    return hashlib.sha256(b"".join(results)).hexdigest()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 instructions")
@pytest.mark.parametrize(
    "features",
    ["+avx,+f16c", "+avx,+avx2,+fma,+f16c"],
    ids=["plain", "avx2"],
)
def test_every_processor_computes_the_same_bits(features: str) -> None:
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, __file__]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == digest()


if __name__ == "__main__":
    print(digest())
