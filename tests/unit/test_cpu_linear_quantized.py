"""Quantised linear layers of the CPU kernel set: what they compute, and that no bit of a row's
result depends on other rows, on threads or on the processor's instructions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.linear_quantized import (
    PackedQuantized,
    embed,
    linear,
    pack_quantized,
    scratch_bytes,
)
from shards.quantization.scheme import INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor

SCHEMES = (INT8, INT6, INT4, INT4_MINIMUM)
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)

each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def run(instructions: Sequence[Instruction], header: dict[Header, int], threads: int = 1) -> None:
    """Every thread's share of an instruction, then the next instruction."""
    step = np.array([header.get(field, 0) for field in Header], np.int64)
    for instruction in instructions:
        operands = np.array(instruction.operands, np.int64)
        function = _FUNCTION(instruction.kernel.address)
        for thread in range(threads):
            assert function(operands.ctypes.data, step.ctypes.data, thread, threads) == 0


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
    y = torch.empty(len(x), packed.outputs)
    scratch = torch.empty(scratch_bytes(*x.shape), dtype=torch.uint8)
    run(linear(packed, x, y, scratch), {Header.ROWS: len(x)}, threads)
    return y


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What int8 codes, 32 inputs to a scale, hold of x."""
    groups = x.unflatten(1, (-1, 32))
    scale = groups.abs().amax(2, keepdim=True) / 127
    return (groups / scale).round().mul(scale).nan_to_num().flatten(1)


@each_scheme
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 49, 96), (7, 70, 32), (31, 16, 160)])
def test_products(scheme: Scheme, rows: int, outputs: int, inputs: int) -> None:
    weight, x = weights(scheme, outputs, inputs), activations(rows, inputs)
    y = multiply(pack_quantized([weight]), x)
    w = weight.dequantize().double()
    # Groups are summed in float32: half an ulp for each of at most 10 terms of a sum.
    size = rounded(x).double().abs() @ w.abs().T
    assert ((y - rounded(x).double() @ w.T).abs() <= size * 10 * 2**-24).all()
    # An activation is off by half a step at most.
    step = x.unflatten(1, (-1, 32)).abs().amax(2).double() / 127
    bound = step / 2 @ w.abs().unflatten(1, (-1, 32)).sum(2).T
    assert ((y - x.double() @ w.T).abs() <= bound * 1.0001).all()


@each_scheme
def test_a_row_alone_or_in_a_batch_by_any_threads_has_the_same_bits(scheme: Scheme) -> None:
    packed, x = pack_quantized([weights(scheme, 113, 96)]), activations(31, 96)
    together = multiply(packed, x)
    assert torch.equal(together, torch.cat([multiply(packed, row) for row in x.split(1)]))
    for rows in (2, 5, 8, 15):
        assert torch.equal(together[:rows], multiply(packed, x[:rows].clone(), threads=3))


def test_more_rows_than_meet_the_weights_at_a_time() -> None:
    packed, x = pack_quantized([weights(INT4, 17, 4096)]), activations(60, 4096)
    assert torch.equal(multiply(packed, x)[41:], multiply(packed, x[41:].clone()))


@each_scheme
def test_the_largest_sums_are_exact(scheme: Scheme) -> None:
    weight = weights(scheme, 3, 64)
    weight.scales.fill_(2**-7)
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        weight.codes.fill_(byte)
        if weight.minima is not None:
            weight.minima.fill_(-2.0)
        x = torch.ones(2, 64)
        x[1] = -127  # codes of -127, a scale of 1
        exact = x[1:].double() @ weight.dequantize().double().T
        assert torch.equal(multiply(pack_quantized([weight]), x)[1:].double(), exact)


def test_bias_and_addition_in_place_touch_the_steps_rows_of_a_slice_alone() -> None:
    weight, x, bias = weights(INT6, 49, 64), activations(9, 64), activations(1, 49)[0]
    packed = pack_quantized([weight])
    wide_x, wide_y = torch.full((9, 80), 7.0), torch.full((9, 60), 5.0)
    wide_x[:, 8:72] = x
    scratch = torch.empty(scratch_bytes(9, 64), dtype=torch.uint8)
    target = wide_y[:, 3:52]
    steps = linear(
        packed, wide_x[:, 8:72], target, scratch, bias=bias, rows=Header.SAMPLED, add=True
    )
    run(steps, {Header.ROWS: 1, Header.SAMPLED: 6}, threads=3)
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


@each_scheme
def test_zeros_give_zeros(scheme: Scheme) -> None:
    packed = pack_quantized([weights(scheme, 16, 64)])
    assert torch.equal(multiply(packed, torch.zeros(2, 64)), torch.zeros(2, 16))


@each_scheme
def test_embedding_is_the_dequantised_row_or_zero(scheme: Scheme) -> None:
    weight = weights(scheme, 49, 96)
    tokens, x = torch.tensor([100, 148, 99, 123, 149, 0]), torch.full((6, 100), 9.0)
    run(
        embed(pack_quantized([weight]), tokens, x[:, :96], first=100),
        {Header.ROWS: 5},
        threads=3,
    )
    rows, none = weight.dequantize(), torch.zeros(96)
    assert torch.equal(x[:5, :96], torch.stack([rows[0], rows[48], none, rows[23], none]))
    assert (x[5] == 9).all()
    assert (x[:, 96:] == 9).all()


@each_scheme
def test_packed_weights_are_not_wider(scheme: Scheme) -> None:
    weight = weights(scheme, 256, 96)
    assert pack_quantized([weight]).nbytes == weight.nbytes


def test_packs_into_the_memory_it_is_given() -> None:
    given: list[torch.Tensor] = []

    def allocate(size: int) -> torch.Tensor:
        given.append(torch.full((size,), 255, dtype=torch.uint8))
        return given[-1]

    packed, x = pack_quantized([weights(INT8, 49, 64)], allocate), activations(2, 64)
    assert [tensor.nbytes for tensor in given] == [packed.nbytes]
    before = multiply(packed, x)
    given[0].zero_()
    assert not torch.equal(multiply(packed, x), before)


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_quantized([weights(INT8, 16, 64)])
    x, y = torch.empty(4, 64), torch.empty(4, 16)
    scratch = torch.empty(scratch_bytes(4, 64), dtype=torch.uint8)
    for arguments, message in (
        ((x[:, :32], y, scratch), r"x \[.*must be \[rows, 64\] of float32"),
        ((x, y.double(), scratch), r"y \[.*must be \[rows, 16\] of float32"),
        ((x, y.T.contiguous().T, scratch), r"each row contiguous"),
        ((x, y[:3], scratch), r"x has 4 rows, y 3"),
        ((x, y, scratch[:-1]), rf"too small: give {scratch.nbytes}"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(packed, *arguments)
    with pytest.raises(ValueError, match=r"bias \[15\] does not fit 16 outputs"):
        linear(packed, x, y, scratch, bias=torch.zeros(15))
    with pytest.raises(ValueError, match=r"tokens must be int64 \[4\]"):
        embed(packed, torch.zeros(4, dtype=torch.int32), x, 0)
    with pytest.raises(ValueError, match=r"int8 \[16, 64\], int4 \[16, 64\]"):
        pack_quantized([weights(INT8, 16, 64), weights(INT4, 16, 64)])
    with pytest.raises(ValueError, match=r"int8 \[16, 64\], int8 \[16, 96\]"):
        pack_quantized([weights(INT8, 16, 64), weights(INT8, 16, 96)])


def digest() -> str:
    """Of what 8 and 6 bits compute: between them they take every path."""
    results = [
        multiply(pack_quantized([weights(scheme, 49, 96)]), activations(3, 96)).numpy().tobytes()
        for scheme in (INT8, INT6)
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
