"""What to run first on a machine with a GPU: everything that elsewhere only stands-in ran for.

pytest -m gpu tests/unit
"""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shards.collectives import nccl, symmetric_memory
from shards.collectives.rendezvous import host_store
from shards.kernels.cuda import CudaKernels
from shards.kernels.cuda.attention import AttentionName
from shards.kernels.reference import ReferenceKernels
from shards.models.spec import ModelSpec
from shards.quantization.packing import pack
from shards.quantization.scheme import INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor
from tests.unit import cuda_ranks as ranks

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
MODULES: dict[AttentionName, str] = {
    "flashinfer": "flashinfer",
    "flash_attention": "flash_attn_interface",
    "sdpa": "torch",
}
SPECS = {
    "llama": ranks.llama(head_dim=64),
    "window": ranks.llama(head_dim=64, window=11),
    "large groups": ranks.llama(heads=8, kv_heads=1, head_dim=128),
}
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 6e-3}  # float32: TF32


def on_gpu(
    spec: ModelSpec, kernels: CudaKernels, dtype: torch.dtype, world: int = 1
) -> list[torch.Tensor]:
    return ranks.run(spec, kernels, dtype, world=world, device=GPU)


def reference(spec: ModelSpec) -> list[torch.Tensor]:
    return ranks.run(spec, ReferenceKernels(ranks.CPU, torch.float64), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", SPECS)
def test_graphs_and_eager_steps_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    found = on_gpu(SPECS[name], CudaKernels(GPU, dtype), dtype)
    assert ranks.error(found, reference(SPECS[name])) < TOLERANCES[dtype]


@pytest.mark.parametrize("attention", MODULES)
@pytest.mark.parametrize("name", SPECS)
def test_each_attention_library(name: str, attention: AttentionName) -> None:
    if importlib.util.find_spec(MODULES[attention]) is None:
        pytest.skip(f"{MODULES[attention]} is not installed")
    if attention == "flash_attention" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("FlashAttention 3 needs compute capability 9.0")
    kernels = CudaKernels(GPU, torch.float16, attention=attention)
    found = on_gpu(SPECS[name], kernels, torch.float16)
    assert ranks.error(found, reference(SPECS[name])) < TOLERANCES[torch.float16]


def test_a_second_epoch_captures_anew() -> None:
    kernels = CudaKernels(GPU, torch.float16)
    first, second = (on_gpu(SPECS["llama"], kernels, torch.float16) for _ in range(2))
    assert ranks.error(first, second) < 1e-3


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [INT8, INT6, INT4, INT4_MINIMUM], ids=lambda s: s.name)
def test_quantised_matmuls(scheme: Scheme, dtype: torch.dtype, rows: int) -> None:
    codes = torch.randint(0, 1 << scheme.bits, (50, 96), device=GPU).to(torch.uint8)
    scales = torch.rand(50, 96 // scheme.group, device=GPU).half()
    minima = -8 * scales if scheme.has_minimum else None
    weight = QuantizedTensor(scheme, pack(codes, scheme.bits), scales, minima)
    x = torch.randn(rows, 96, device=GPU, dtype=dtype)
    expected = x.double() @ weight.dequantize().double().T
    at = torch.tensor([49, 0], device=GPU)
    expected_rows = weight.dequantize(dtype)[at]
    matrix = CudaKernels(GPU, dtype).pack([weight])
    assert torch.equal(matrix.rows(at), expected_rows)
    error = (matrix.apply(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-2


@pytest.mark.parametrize("rows", [1, 40])
def test_float8_matmul(rows: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need compute capability 8.9")
    weight = torch.randn(48, 64, device=GPU).bfloat16()
    x = torch.randn(rows, 64, device=GPU).bfloat16()
    expected = x.double() @ weight.double().T
    matrix = CudaKernels(GPU, torch.bfloat16, quantize_to_float8=True).pack([weight])
    assert (matrix.apply(x).double() - expected).abs().max() / expected.abs().max() < 2**-4


Transport = Callable[..., nccl.Nccl]


@pytest.mark.parametrize("transport", [nccl.Nccl, symmetric_memory.SymmetricMemory])
def test_sums_of_two_gpus_eager_and_in_a_graph(transport: Transport) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    _store, address = host_store()
    context = mp.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_sums, args=(transport, address, rank, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    wrong = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(30)
    assert wrong == [[], []]


def _sums(transport: Transport, address: str, rank: int, answers: Any) -> None:
    """Puts the (elements, dtype, how) whose sums are wrong."""
    device = torch.device("cuda", rank)
    group = transport(address, 1, rank, 2, 30.0, device)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for elements in (8, 1 << 10, 1 << 17, 1 << 20):  # each algorithm, and NCCL
            at = torch.arange(elements, device=device) % 100
            own, expected = (at * (rank + 1)).to(dtype), (at * 3).to(dtype)
            x = own.clone()
            if not torch.equal(group.all_reduce(x), expected):
                wrong.append((elements, str(dtype), "eager"))
            graph = torch.cuda.CUDAGraph()
            x.copy_(own)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                group.all_reduce(x)
            for _ in range(3):
                x.copy_(own)
                graph.replay()
                if not torch.equal(x, expected):
                    wrong.append((elements, str(dtype), "graph"))
    group.barrier()
    answers.put(wrong)
    group.close()
