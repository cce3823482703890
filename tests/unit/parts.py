"""Ranks on threads that compute a spec with random weights, on any kernel set: no checkpoint, no
family, no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from shards.batch import Batch
from shards.collectives.local import ThreadGroup
from shards.kernels.base import KernelSet, Limits, Weight
from shards.kv_cache import LayerCache
from shards.layout import Range, make_layout
from shards.models.decoder import Decoder
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import LatentAttention, ModelSpec
from shards.timing import PhaseTimer

CPU = torch.device("cpu")
BLOCK, BLOCKS, TABLE = 8, 24, 6
LIMITS = Limits(rows=32, sequences=4, blocks=TABLE, sampled=8)
Make = Callable[[torch.dtype], KernelSet[Any]]


def random_weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """float64; matrices keep the size of what goes through them, biases are not zero."""
    generator = torch.Generator().manual_seed(7)
    return {p.name: _random(p, generator) for p in parameters(spec)}


def _random(parameter: Parameter, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if len(parameter.shape) == 2:
        return drawn / parameter.shape[1] ** 0.5
    norm = "norm" in parameter.name and parameter.name.endswith(".weight")
    return 1 + drawn / 4 if norm else drawn / 4


class Rank:
    """One rank's decoder, caches and executor."""

    def __init__(
        self,
        spec: ModelSpec,
        world: int,
        rank: int,
        group: ThreadGroup,
        make: Make,
        dtype: torch.dtype,
        weights: dict[str, torch.Tensor],
        expert_parallel: bool,
    ) -> None:
        layout = make_layout(spec, world, expert_parallel=expert_parallel)
        kernels = make(dtype)
        held: dict[str, Weight] = {
            p.name: _cut(weights[p.name], p, layout.owned(p, rank)).to(dtype)
            for p in parameters(spec)
            if layout.owned(p, rank)
        }
        self.decoder = Decoder(spec, layout, rank, held, kernels)
        self.caches: Sequence[LayerCache] = [
            kernels.allocate(
                BLOCKS,
                len(split.kv_heads[rank]),
                BLOCK,
                layer.attention.head_dim,
                layer.attention.latent if isinstance(layer.attention, LatentAttention) else None,
            )
            for layer, split in zip(spec.layers, layout.layers, strict=True)
        ]
        self._executor = kernels.executor(self.decoder, self.caches, group[rank], LIMITS)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of every sequence's last row, of this rank's vocabulary."""
        timer = PhaseTimer()
        self._executor.forward(batch, timer)
        last = batch.spans_S4[:, 0] + batch.spans_S4[:, 1] - 1
        return self._executor.logits(last, timer).double().clone()


def _cut(weight: torch.Tensor, parameter: Parameter, owned: Range) -> torch.Tensor:
    if parameter.cut is Cut.REPLICATED:
        return weight
    return weight.narrow(parameter.axis, owned.start, len(owned)).contiguous()


class Ranks:
    """All ranks of a group, with `random_weights` where none are given; `expert_parallel` as of
    `make_layout`."""

    def __init__(
        self,
        spec: ModelSpec,
        world: int,
        make: Make,
        dtype: torch.dtype,
        *,
        weights: dict[str, torch.Tensor] | None = None,
        expert_parallel: bool = False,
    ) -> None:
        self._pool = ThreadPoolExecutor(world)
        group, given = ThreadGroup(world, deadline_s=60), weights or random_weights(spec)

        def rank(at: int) -> Rank:
            return Rank(spec, world, at, group, make, dtype, given, expert_parallel)

        self.ranks = list(self._pool.map(rank, range(world)))

    def logits(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """[sequences, vocabulary] of each step."""
        found = []
        for batch in batches:
            slices = self._pool.map(lambda rank, batch=batch: rank.run(batch), self.ranks)
            found.append(torch.cat(list(slices), 1))
        return found

    def close(self) -> None:
        self._pool.shutdown()


def steps(vocabulary: int) -> list[Batch]:
    """Three sequences: prefills of several chunks, beside decodes, then decodes alone."""
    random = np.random.default_rng(3)
    tables = random.permutation(BLOCKS).reshape(4, TABLE)
    spans = (
        [(2, 0, 19)],  # (table row, first position, tokens)
        [(2, 19, 9), (0, 0, 5)],
        [(0, 5, 1), (2, 28, 1), (1, 0, 13)],
        [(1, 13, 1), (2, 29, 1), (0, 6, 1)],
    )
    return [_batch(step, tables, random, vocabulary) for step in spans]


def _batch(
    spans: Sequence[tuple[int, int, int]],
    tables: np.ndarray,
    random: np.random.Generator,
    vocabulary: int,
) -> Batch:
    slots = np.concatenate([np.full(count, slot) for slot, _, count in spans])
    positions = np.concatenate([np.arange(at, at + count) for _, at, count in spans])
    counts = np.array([count for _, _, count in spans])
    firsts = np.cumsum(counts) - counts
    rows = [
        (first, count, at + count, slot)
        for first, (slot, at, count) in zip(firsts, spans, strict=True)
    ]
    return Batch(
        random.integers(0, vocabulary, len(slots)),
        positions,
        tables[slots, positions // BLOCK],
        positions % BLOCK,
        np.array(rows, np.int64),
        tables,
    )
