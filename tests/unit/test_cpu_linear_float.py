"""Float linear layers and embeddings of the CPU kernel set, instruction by instruction."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numba
import numpy as np
import pytest
import torch

from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.linear_float import PackedFloat, embed, linear, pack_float
from shards.kernels.cpu.simd import fma_scalar

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# outputs, inputs: less than a vector, no whole panel, several blocks of inputs, whole panels.
SHAPES = ((3, 5), (49, 37), (200, 1100), (192, 64))
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)


def run(instructions: Sequence[Instruction], threads: int = 1, **fields: int) -> None:
    """As a program does, the threads one after the other."""
    header = np.zeros(len(Header), np.int64)
    for name, value in fields.items():
        header[Header[name]] = value
    for instruction in instructions:
        operands = np.array(instruction.operands, np.int64)
        kernel = _KERNEL(instruction.kernel.address)
        for thread in range(threads):
            assert kernel(operands.ctypes.data, header.ctypes.data, thread, threads) == 0


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@numba.njit
def chains(x, weight, y):  # type: ignore[no-untyped-def]
    """What a linear layer is to compute: one chain of multiply-adds per output."""
    for r in range(x.shape[0]):
        for o in range(weight.shape[0]):
            total = y[r, o]
            for k in range(x.shape[1]):
                total = fma_scalar(x[r, k], weight[o, k], total)
            y[r, o] = total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_every_output_is_one_chain_whatever_the_rows(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    weight, x, before = (
        random(outputs, inputs, dtype=dtype),
        random(40, inputs),
        random(40, outputs),
    )
    expected = before.numpy().copy()
    chains(x.numpy(), weight.float().numpy(), expected)
    packed = pack_float(weight)
    for rows in (1, 2, 3, 5, 7, 8, 13, 14, 15, 29, 40):
        y = before.clone()
        run(linear(packed, x, y, add=True), ROWS=rows)
        np.testing.assert_array_equal(y[:rows].numpy(), expected[:rows])
        assert torch.equal(y[rows:], before[rows:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_matches_float64(dtype: torch.dtype, threads: int, add: bool, biased: bool) -> None:
    rows, outputs, inputs = 7, 150, 321
    weight, x, before = random(outputs, inputs, dtype=dtype), random(rows, inputs), random(9, 150)
    bias = random(outputs, dtype=dtype) if biased else None
    y = before.clone()
    run(linear(pack_float(weight), x, y[:rows], bias_O=bias, add=add), threads, ROWS=rows)

    start = torch.zeros(rows, outputs, dtype=torch.float64)
    start += 0 if bias is None else bias.double()
    start += before[:rows].double() if add else 0
    exact = start + x.double() @ weight.double().T
    # Higham, Accuracy and Stability, (3.5): n roundings of a sum are off by n u of its magnitudes.
    magnitude = start.abs() + x.double().abs() @ weight.double().abs().T + before[:rows].abs()
    assert ((y[:rows] - exact).abs() <= (inputs + 2) * 2**-24 * magnitude).all()
    assert torch.equal(y[rows:], before[rows:])


def test_threads_do_not_change_bits() -> None:
    packed, x = pack_float(random(330, 70, dtype=torch.bfloat16)), random(20, 70)
    alone, shared = torch.empty(20, 330), torch.empty(20, 330)
    run(linear(packed, x, alone), ROWS=20)
    run(linear(packed, x, shared), threads=3, ROWS=20)
    assert torch.equal(alone, shared)


def test_columns_of_wider_buffers() -> None:
    """Only the columns of y are written, and a NaN beside x is not read."""
    packed = pack_float(random(49, 20))
    x, y = torch.full((6, 30), float("nan")), torch.full((6, 80), 5.0)
    x[:, 4:24] = random(6, 20)
    plain = torch.empty(6, 49)
    run(linear(packed, x[:, 4:24], y[:, 10:59]), ROWS=6)
    run(linear(packed, x[:, 4:24].contiguous(), plain), ROWS=6)
    assert torch.equal(y[:, 10:59], plain)
    assert (y[:, :10] == 5).all()
    assert (y[:, 59:] == 5).all()


def test_rows_may_be_counted_by_another_field_of_the_header() -> None:
    packed, x, y = pack_float(random(40, 8)), random(5, 8), torch.zeros(5, 40)
    run(linear(packed, x, y, rows=Header.SAMPLED), ROWS=5, SAMPLED=2)
    assert (y[:2] != 0).all()
    assert (y[2:] == 0).all()


def test_no_rows_write_nothing() -> None:
    y = torch.full((3, 40), 5.0)
    run(linear(pack_float(random(40, 8)), random(3, 8), y), ROWS=0)
    assert (y == 5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_embed_reads_the_rows_of_this_rank(dtype: torch.dtype, index: torch.dtype) -> None:
    weight = random(70, 33, dtype=dtype)
    tokens = torch.tensor([100, 169, 99, 170, 165, 0, 131, 7], dtype=index)
    x = torch.full((8, 33), 5.0)
    run(embed(pack_float(weight), tokens, x, first=100), threads=3, ROWS=7)
    expected = torch.zeros(7, 33)
    for row, token in ((0, 0), (1, 69), (4, 65), (6, 31)):
        expected[row] = weight[token].float()
    assert torch.equal(x[:7], expected)
    assert (x[7] == 5).all()


def test_packed_weights_lie_where_they_are_told_to() -> None:
    arena = torch.zeros(1 << 16, dtype=torch.uint8)
    packed = pack_float(random(49, 20, dtype=torch.float16), lambda nbytes: arena[64 : 64 + nbytes])
    assert packed.panels_PKN.data_ptr() == arena.data_ptr() + 64
    assert packed.nbytes == packed.panels_PKN.numel() * 2
    assert (packed.outputs, packed.inputs) == (49, 20)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.float64)], ids=str
)
def test_pack_refuses_what_is_no_float_matrix(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"float linear layers take \[outputs, inputs\]"):
        pack_float(weight)


@pytest.fixture
def small() -> PackedFloat:
    return pack_float(random(4, 6))


def test_linear_refuses_buffers_that_do_not_fit(small: PackedFloat) -> None:
    x, y = torch.zeros(2, 6), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"x \[2, 5\].*must be \[rows, 6\] of float32"):
        linear(small, torch.zeros(2, 5), y)
    with pytest.raises(ValueError, match=r"y .*float64.*must be \[rows, 4\] of float32"):
        linear(small, x, y.double())
    with pytest.raises(ValueError, match="each row contiguous"):
        linear(small, torch.zeros(6, 2).T, y)
    with pytest.raises(ValueError, match=r"bias \[6\]: must be \[4\]"):
        linear(small, x, y, bias_O=torch.zeros(6))


def test_embed_refuses_tokens_that_are_no_indices(small: PackedFloat) -> None:
    with pytest.raises(ValueError, match="must be contiguous int32 or int64"):
        embed(small, torch.zeros(2), torch.zeros(2, 6))
