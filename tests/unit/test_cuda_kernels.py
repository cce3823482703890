"""The CUDA kernel set computes what the reference does; here on the CPU, through PyTorch alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from shards.collectives.local import Local, ThreadGroup
from shards.kernels.cuda import CudaKernels
from shards.kernels.cuda.attention.sdpa import Sdpa
from shards.kernels.cuda.device import DeviceError
from shards.kernels.cuda.graphs import Capture
from shards.kernels.reference import ReferenceKernels
from shards.layout import make_layout
from shards.models.decoder import Decoder
from shards.models.spec import ModelSpec
from shards.timing import PhaseTimer
from tests.unit import cuda_ranks as ranks
from tests.unit.cuda_ranks import CPU

SPECS = {
    "llama": ranks.llama(),
    "window": ranks.llama(window=11),
    "one KV head": ranks.llama(heads=3, kv_heads=1),
    "gpt2": ranks.gpt2(),
}
TOLERANCE = 5e-6  # float32, of the largest logit


def reference(spec: ModelSpec) -> list[torch.Tensor]:
    return ranks.run(spec, ReferenceKernels(CPU, torch.float64), torch.float64)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", SPECS)
def test_eager_steps_equal_the_reference(name: str, world: int) -> None:
    spec = SPECS[name]
    found = ranks.run(spec, CudaKernels(CPU, torch.float32), torch.float32, world=world)
    assert ranks.error(found, reference(spec)) < TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_graphs_hold_no_number_of_the_step_they_were_captured_with(name: str) -> None:
    spec = SPECS[name]
    geometry = ranks.geometry(spec)
    found = ranks.run(
        spec,
        CudaKernels(CPU, torch.float32),
        torch.float32,
        executor=ranks.Captured(Sdpa(geometry), geometry, ranks.traced),
    )
    assert ranks.error(found, reference(spec)) < TOLERANCE


def test_a_cache_has_a_block_that_no_sequence_owns() -> None:
    cache = CudaKernels(CPU, torch.float32).allocate(4, 2, 8, 16)
    assert cache.keys.shape == cache.values.shape == (5, 2, 8, 16)


def test_ranks_that_would_pad_differently_refuse_to_start() -> None:
    spec = ranks.llama()
    geometry = ranks.geometry(spec)
    captures: list[Capture | None] = [ranks.again, None]

    def run(rank: int) -> None:
        make = ranks.Captured(Sdpa(geometry), geometry, captures[rank])
        kernels = CudaKernels(CPU, torch.float32)
        layout = make_layout(spec, 2)
        weights = ranks.shard(spec, layout, rank, torch.float32)
        decoder = Decoder(spec, layout, rank, weights, kernels)
        make(decoder, ranks.allocate(spec, layout, rank, kernels), group[rank])

    group = ThreadGroup(2, deadline_s=20)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(run, rank) for rank in range(2)]
    for rank, each in enumerate(made):
        refusal = each.exception()
        assert isinstance(refusal, DeviceError)
        assert f"rank {1 - rank} does otherwise: install the same packages" in str(refusal)


def test_logits_of_some_rows_of_a_captured_decode() -> None:
    spec = ranks.llama()
    geometry = ranks.geometry(spec)
    kernels = CudaKernels(CPU, torch.float32)
    layout = make_layout(spec, 1)
    decoder = Decoder(spec, layout, 0, ranks.shard(spec, layout, 0, torch.float32), kernels)
    executor = ranks.Captured(Sdpa(geometry), geometry, ranks.again)(
        decoder, ranks.allocate(spec, layout, 0, kernels), Local()
    )
    timer = PhaseTimer()
    *prompts, decodes = ranks.steps()[:4]
    for step in prompts:
        executor.forward(step, timer)
    executor.forward(decodes, timer)
    every = executor.logits(np.arange(3), timer).clone()
    assert torch.equal(executor.logits(np.array([2, 0]), timer), every[[2, 0]])


def test_logits_before_a_step_are_refused() -> None:
    spec = ranks.llama()
    kernels = CudaKernels(CPU, torch.float32)
    layout = make_layout(spec, 1)
    decoder = Decoder(spec, layout, 0, ranks.shard(spec, layout, 0, torch.float32), kernels)
    caches = ranks.allocate(spec, layout, 0, kernels)
    executor = kernels.executor(decoder, caches, Local(), ranks.LIMITS)
    with pytest.raises(RuntimeError, match="before a step"):
        executor.logits(np.zeros(1, np.int64), PhaseTimer())
