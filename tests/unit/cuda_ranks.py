"""Tiny models of random weights on the CUDA kernel set's CPU path, beside the reference set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from shards.batch import Batch
from shards.collectives.base import Collective
from shards.collectives.local import Local, ThreadGroup
from shards.kernels.base import Executor, KernelSet, Limits, Weight
from shards.kernels.cuda.attention import AttentionBackend, Geometry
from shards.kernels.cuda.elementwise import TorchElementwise
from shards.kernels.cuda.epoch import Epoch
from shards.kernels.cuda.executor import CudaExecutor
from shards.kernels.cuda.graphs import Capture
from shards.kernels.cuda.step import Angles
from shards.kv_cache import LayerCache
from shards.layout import Layout, make_layout
from shards.models.decoder import Decoder
from shards.models.parameters import parameters
from shards.models.spec import (
    Attention,
    FeedForward,
    Layer,
    LearnedPositions,
    ModelSpec,
    Norm,
    Rotary,
)
from shards.timing import PhaseTimer

CPU = torch.device("cpu")
BLOCK, BLOCKS, WIDTH = 8, 24, 6  # tokens to a block, blocks, blocks to a table
LIMITS = Limits(rows=32, sequences=4, blocks=WIDTH, sampled=8)


def llama(
    heads: int = 6, kv_heads: int = 2, head_dim: int = 16, window: int | None = None
) -> ModelSpec:
    """Two layers; the second attends through `window`."""
    attention = (
        Attention(
            heads,
            kv_heads,
            head_dim,
            head_dim**-0.5,
            qkv_bias=True,
            window=at,
            rotary=Rotary(10000.0, head_dim),
        )
        for at in (None, window)
    )
    ffn = FeedForward(40, "silu", gated=True)
    return ModelSpec(
        architecture="Tiny",
        width=32,
        vocabulary=53,
        context=BLOCK * WIDTH,
        layers=tuple(Layer(a, ffn) for a in attention),
        norm=Norm("rms", 1e-5),
    )


def gpt2() -> ModelSpec:
    layer = Layer(
        Attention(4, 4, 16, 0.25, qkv_bias=True, out_bias=True),
        FeedForward(40, "gelu_tanh", gated=False, bias=True),
    )
    return ModelSpec(
        architecture="Tiny",
        width=32,
        vocabulary=53,
        context=BLOCK * WIDTH,
        layers=(layer,),
        norm=Norm("layer", 1e-5, bias=True),
        positions=LearnedPositions(BLOCK * WIDTH),
        tied_embeddings=True,
    )


def shard(
    spec: ModelSpec, layout: Layout, rank: int, dtype: torch.dtype, device: torch.device = CPU
) -> dict[str, Weight]:
    """A rank's slices; the same whole weights for every layout."""
    random = torch.Generator().manual_seed(5)
    loaded: dict[str, Weight] = {}
    for parameter in parameters(spec):
        whole = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        whole = whole / parameter.shape[-1] ** 0.5 + parameter.name.endswith("norm.weight")
        owned = layout.owned(parameter, rank)
        mine = whole.narrow(parameter.axis, owned.start, len(owned))
        loaded[parameter.name] = mine.to(device, dtype)
    return loaded


def steps() -> list[Batch]:
    """Prompts in chunks and beside decodes, then decodes of several numbers of rows."""
    random = np.random.default_rng(3)
    tables = random.permutation(BLOCKS).reshape(4, WIDTH)
    return [
        batch(spans, tables, random)
        for spans in (
            [(2, 0, 19)],  # (row of `tables`, first position, tokens)
            [(2, 19, 9), (0, 0, 5)],
            [(0, 5, 1), (2, 28, 1), (1, 0, 13)],
            [(1, 13, 1), (2, 29, 1), (0, 6, 1)],
            [(0, 7, 1)],
            [(2, 30, 1), (0, 8, 1)],
            [(1, 14, 1), (2, 31, 1), (0, 9, 1)],
            [(2, 32, 1)],
        )
    ]


def batch(
    spans: Sequence[tuple[int, int, int]], tables: np.ndarray, random: np.random.Generator
) -> Batch:
    slots = np.concatenate([np.full(count, slot) for slot, _, count in spans])
    positions = np.concatenate([np.arange(at, at + count) for _, at, count in spans])
    counts = np.array([count for _, _, count in spans])
    rows = [
        (end - count, count, at + count, slot)
        for end, (slot, at, count) in zip(np.cumsum(counts), spans, strict=True)
    ]
    return Batch(
        random.integers(0, 53, len(slots)),
        positions,
        tables[slots, positions // BLOCK],
        positions % BLOCK,
        np.array(rows, np.int64),
        tables,
    )


def allocate(
    spec: ModelSpec, layout: Layout, rank: int, kernels: KernelSet[Any]
) -> list[LayerCache]:
    return [
        kernels.allocate(BLOCKS, len(split.kv_heads[rank]), BLOCK, layer.attention.head_dim)
        for layer, split in zip(spec.layers, layout.layers, strict=True)
    ]


MakeExecutor = Callable[[Decoder[Any], list[LayerCache], Collective], Executor]


def run(
    spec: ModelSpec,
    kernels: KernelSet[Any],
    dtype: torch.dtype,
    *,
    world: int = 1,
    device: torch.device = CPU,
    executor: MakeExecutor | None = None,
) -> list[torch.Tensor]:
    """The whole vocabulary's logits of every step's last rows, float64."""
    layout = make_layout(spec, world)
    group = ThreadGroup(world, deadline_s=20)

    def rank_logits(rank: int) -> list[torch.Tensor]:
        collective: Collective = Local() if world == 1 else group[rank]
        decoder = Decoder(spec, layout, rank, shard(spec, layout, rank, dtype, device), kernels)
        caches = allocate(spec, layout, rank, kernels)
        if executor is None:
            made = kernels.executor(decoder, caches, collective, LIMITS)
        else:
            made = executor(decoder, caches, collective)
        return [last_logits(made, step) for step in steps()]

    with ThreadPoolExecutor(world) as pool:
        slices = list(pool.map(rank_logits, range(world)))
    return [torch.cat(parts, -1) for parts in zip(*slices, strict=True)]


@torch.inference_mode()
def last_logits(executor: Executor, step: Batch) -> torch.Tensor:
    timer = PhaseTimer()
    executor.forward(step, timer)
    last = step.spans_S4[:, 0] + step.spans_S4[:, 1] - 1
    return executor.logits(last, timer).double().cpu().clone()


def geometry(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Geometry:
    head_dims = frozenset(layer.attention.head_dim for layer in spec.layers)
    return Geometry(head_dims, BLOCK, WIDTH, dtype, device)


@dataclass(frozen=True)
class Captured:
    """Makes executors whose graphs are taken down by `capture`."""

    attention: AttentionBackend
    geometry: Geometry
    capture: Capture | None

    def __call__(
        self, decoder: Decoder[Any], caches: list[LayerCache], collective: Collective
    ) -> CudaExecutor:
        epoch = Epoch(
            decoder,
            caches,
            collective,
            self.geometry,
            scratch=BLOCKS,
            attention=self.attention,
            elementwise=TorchElementwise(),
            angles=Angles(CPU),
        )
        return CudaExecutor(epoch, LIMITS, self.capture)


def again(work: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` that runs the work itself, for what cannot be traced."""
    work()
    return work


def traced(work: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` that keeps what a CUDA graph keeps: the kernels' calls and the addresses of their
    operands, and no Python."""
    work()

    def kernels() -> None:  # `work` may be a method, which make_fx takes for one of an argument
        work()

    return make_fx(kernels)()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Put a module of these members where a library would be."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest, relative to the largest logit of its step."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
