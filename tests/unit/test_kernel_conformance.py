"""Every kernel set computes what the reference does, in float64, for every sentence.

A small decoder speaks each sentence with every kind of word; its steps mix prefill chunks of
several sequences with decodes, so that spans, tables and positions are all told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch

from shards.batch import Batch
from shards.collectives.local import Local
from shards.kernels.base import (
    Embedding,
    Gating,
    Head,
    KernelSet,
    Limits,
    Linear,
    Norm,
    Part,
    Pattern,
    PositionTable,
    Rotation,
    Sentences,
    Weight,
)
from shards.kernels.cpu import CpuKernels
from shards.kernels.cuda import CudaKernels
from shards.kernels.reference import ReferenceKernels
from shards.kv_cache import LayerCache
from shards.models.spec import Activation
from shards.quantization.quantize import quantize
from shards.quantization.scheme import INT4, INT4_MINIMUM, INT6, INT8, Scheme
from shards.timing import PhaseTimer

CPU = torch.device("cpu")
BLOCK = 8
BLOCKS = 24
LIMITS = Limits(rows=32, sequences=4, blocks=6, sampled=8)
VOCABULARY, FIRST = 53, 5  # tokens below FIRST belong to another rank


@dataclass(frozen=True)
class Model:
    """A decoder of one layer, in words."""

    width: int = 48
    head_dim: int = 16
    kv_of_head: tuple[int, ...] = (0, 0, 0, 1, 1, 1)
    channels: int = 40
    norm: Literal["rms", "layer"] = "rms"
    bias: bool = False
    rotation: tuple[int, bool] | None = (16, False)  # channels turned, interleaved
    positions: bool = False
    activation: Activation = "silu"
    gated: bool = True
    window: int | None = None
    scheme: Scheme | None = None


MODELS = {
    "llama": Model(),
    "gpt2": Model(
        norm="layer",
        bias=True,
        rotation=None,
        positions=True,
        activation="gelu_tanh",
        gated=False,
        kv_of_head=(0, 1, 2),
    ),
    "one KV head": Model(kv_of_head=(0,) * 5, head_dim=8, rotation=(8, False)),
    "groups cut at both ends": Model(kv_of_head=(0, 1, 1, 1, 2, 2)),
    "biases": Model(bias=True, activation="gelu"),
    "part of a head turned": Model(rotation=(8, False)),
    "interleaved": Model(rotation=(16, True), activation="relu"),
    "window": Model(window=11),
    "awkward widths": Model(width=49, head_dim=10, rotation=(6, False), channels=31),
    "head of 80": Model(width=64, head_dim=80, kv_of_head=(0, 0), rotation=(80, False)),
    "int8": Model(width=64, head_dim=32, channels=96, scheme=INT8),
    "int4": Model(width=64, head_dim=32, channels=96, scheme=INT4),
    "int4 with minimum": Model(width=64, head_dim=32, channels=96, scheme=INT4_MINIMUM),
    "int6": Model(width=64, head_dim=32, channels=96, scheme=INT6),
}
FLOATS = {name: model for name, model in MODELS.items() if model.scheme is None}


class Decoder:
    """`Decodes` with random words; the same seed gives the same weights to any set."""

    def __init__(self, model: Model, kernels: KernelSet[Any], dtype: torch.dtype) -> None:
        self._model = model
        self._random = torch.Generator().manual_seed(7)
        self._dtype = dtype
        self._kernels = kernels
        heads = len(model.kv_of_head) * model.head_dim
        kv = (model.kv_of_head[-1] + 1) * model.head_dim
        self.pattern = Pattern(model.kv_of_head, model.head_dim**-0.5, model.window)
        self.embedding = Embedding(kernels.pack([self._weight(VOCABULARY, model.width)]), FIRST)
        self.positions = None
        if model.positions:
            table = kernels.vector(self._draw(200, model.width))
            self.positions = PositionTable(table, offset=2)
        self.rotation = None
        if model.rotation is not None:
            dim, interleaved = model.rotation
            inverse = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            self.rotation = Rotation(inverse, interleaved, factor=1.1)
        self.norms = [self._norm() for _ in range(3)]
        self.qkv = self._linear(model.width, heads, kv, kv)
        self.out = self._linear(heads, model.width)
        parts = (model.channels,) * (2 if model.gated else 1)
        self.up = self._linear(model.width, *parts)
        self.down = self._linear(model.channels, model.width)

    @property
    def patterns(self) -> Sequence[Pattern]:
        return (self.pattern,)

    def hidden(self, step: Sentences[Any], caches: Sequence[LayerCache]) -> torch.Tensor:
        model, (cache,) = self._model, caches
        x = step.embed(self.embedding, self.positions)
        q = step.project(x, self.norms[0], self.qkv, self.pattern, None, self.rotation, cache)
        attended = Part(step.attend(q, self.pattern, cache), self.out)
        x = step.merge(x, [attended], "attention")
        h = step.expand(x, self.norms[1], self.up, Gating(model.activation, model.gated))
        return step.merge(x, [Part(h, self.down)], "ffn")

    def logits(self, step: Sentences[Any], x_SD: torch.Tensor) -> torch.Tensor:
        return step.logits(x_SD, Head(self.norms[2], Linear(self.embedding.matrix)))

    def _draw(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self._random, dtype=torch.float64)
        return drawn.to(self._dtype if self._model.scheme is None else torch.float32)

    def _weight(self, rows: int, inputs: int) -> Weight:
        weight = self._draw(rows, inputs) / inputs**0.5
        return weight if self._model.scheme is None else quantize(weight, self._model.scheme)

    def _linear(self, inputs: int, *outputs: int) -> Linear[Any]:
        matrix = self._kernels.pack([self._weight(rows, inputs) for rows in outputs])
        bias = self._kernels.vector(self._draw(sum(outputs))) if self._model.bias else None
        return Linear(matrix, bias)

    def _norm(self) -> Norm:
        model = self._model
        weight = self._kernels.vector(1 + self._draw(model.width) / 4)
        bias = self._kernels.vector(self._draw(model.width) / 4) if model.bias else None
        return Norm(model.norm, 1e-5, weight, bias)


def steps() -> list[Batch]:
    """Three sequences: long prompt in chunks, short prompt, then all decode side by side."""
    random = np.random.default_rng(3)
    tables = random.permutation(BLOCKS).reshape(4, 6)
    made = []
    for spans in (
        [(2, 0, 19)],  # (table row, first position, tokens)
        [(2, 19, 9), (0, 0, 5)],
        [(0, 5, 1), (2, 28, 1), (1, 0, 13)],
        [(1, 13, 1), (2, 29, 1), (0, 6, 1)],
    ):
        slots = np.concatenate([np.full(count, slot) for slot, _, count in spans])
        positions = np.concatenate([np.arange(at, at + count) for _, at, count in spans])
        counts = np.array([count for _, _, count in spans])
        firsts = np.cumsum(counts) - counts
        rows = [
            (first, count, at + count, slot)
            for first, (slot, at, count) in zip(firsts, spans, strict=True)
        ]
        made.append(
            Batch(
                random.integers(0, FIRST + VOCABULARY, len(slots)),
                positions,
                tables[slots, positions // BLOCK],
                positions % BLOCK,
                np.array(rows, np.int64),
                tables,
            )
        )
    return made


def run(model: Model, kernels: KernelSet[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """The logits of every step's last rows."""
    decoder = Decoder(model, kernels, dtype)
    cache = kernels.allocate(BLOCKS, model.kv_of_head[-1] + 1, BLOCK, model.head_dim)
    executor = kernels.executor(decoder, [cache], Local(), LIMITS)
    found = []
    with torch.inference_mode():
        for batch in steps():
            timer = PhaseTimer()
            executor.forward(batch, timer)
            last = batch.spans_S4[:, 0] + batch.spans_S4[:, 1] - 1
            found.append(executor.logits(last, timer).double().clone())
    return found


Make = Callable[[torch.dtype], KernelSet[Any]]

SETS: dict[str, Make] = {
    "reference": lambda dtype: ReferenceKernels(CPU, dtype),
    "cpu": lambda dtype: CpuKernels(dtype, threads=1),
    "cpu, 3 threads": lambda dtype: CpuKernels(dtype, threads=3),
    "cpu, integers": lambda dtype: CpuKernels(dtype, threads=1, integers=True),
    "cuda, run on a CPU": lambda dtype: CudaKernels(CPU, dtype),
}
# A row of 48 to 96 sums loses some units of 2^-24 in float32; a rounded cache some of 2^-9 or
# 2^-12, and quantised activations of 2^-8, of what is added.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
QUANTISED = 3e-2


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kernels", SETS)
def test_float32_equals_the_reference_in_float64(kernels: str, name: str) -> None:
    expected = run(MODELS[name], ReferenceKernels(CPU, torch.float64), torch.float64)
    found = run(MODELS[name], SETS[kernels](torch.float32), torch.float32)
    assert error(found, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", SETS)
def test_16_bits_stay_within_their_rounding(kernels: str, dtype: torch.dtype) -> None:
    expected = run(MODELS["llama"], ReferenceKernels(CPU, torch.float64), torch.float64)
    found = run(MODELS["llama"], SETS[kernels](dtype), dtype)
    assert error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", sorted(MODELS.keys() - FLOATS.keys()))
@pytest.mark.parametrize("kernels", SETS)
def test_quantised_weights_mean_what_they_dequantise_to(kernels: str, name: str) -> None:
    expected = run(MODELS[name], ReferenceKernels(CPU, torch.float32), torch.float32)
    found = run(MODELS[name], SETS[kernels](torch.float32), torch.float32)
    assert error(found, expected) < QUANTISED


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    once = run(MODELS["llama"], CpuKernels(torch.bfloat16, threads=1), torch.bfloat16)
    again = run(MODELS["llama"], CpuKernels(torch.bfloat16, threads=threads), torch.bfloat16)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
