"""Takes sentences down as instructions on buffers that outlive the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch

from shards.collectives.base import Collective
from shards.collectives.shared_memory import SharedMemory
from shards.kernels.base import (
    Activation,
    Embedding,
    Limits,
    Linear,
    Norm,
    Pattern,
    PositionTable,
    Rotation,
)
from shards.kernels.cpu import activations, matrix, norms, reduce, rotary, rows
from shards.kernels.cpu.attention import AttentionScratch, attention
from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.matrix import CpuMatrix
from shards.kernels.cpu.program import Step
from shards.kv_cache import LayerCache
from shards.timing import Phase


class Inputs:
    """Where a step's numbers lie; see `shards.batch.Batch`. `sampled`: the rows of the logits."""

    def __init__(self, limits: Limits) -> None:
        self.tokens, self.positions, self.blocks, self.offsets = np.zeros(
            (4, limits.rows), np.int64
        )
        self.spans = np.zeros((limits.rows, 4), np.int64)
        self.tables = np.zeros((limits.sequences, limits.blocks), np.int64)
        self.sampled = np.zeros(limits.sampled, np.int64)


class Recorder:
    """`Sentences` about steps to come.

    A buffer belongs to a word of the sentences ("normed", "qkv"..) and is used by every layer in
    turn. `steps` are what a `Program` takes.
    """

    def __init__(
        self,
        inputs: Inputs,
        limits: Limits,
        collective: Collective,
        threads: int,
        *,
        integers: bool,
    ) -> None:
        self.steps: list[tuple[Phase, Step]] = []
        self._inputs = inputs
        self._limits = limits
        self._collective = collective
        self._threads = threads
        self._integers = integers
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._rooms: dict[int, torch.Tensor] = {}
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._scratch: dict[int, AttentionScratch] = {}

    def check(self, status: int) -> None:
        """Only a collective's instruction ever fails."""
        if status != 0 and isinstance(self._collective, SharedMemory):
            self._collective.check(status)

    def embed(
        self, embedding: Embedding[CpuMatrix], positions: PositionTable | None
    ) -> torch.Tensor:
        x_TD = self._buffer("hidden", embedding.matrix.inputs)
        tokens = torch.from_numpy(self._inputs.tokens)
        self._add("embed", matrix.embed(embedding.matrix, tokens, x_TD, embedding.first))
        self._all_reduce(x_TD)
        if positions is not None:
            at = torch.from_numpy(self._inputs.positions)
            self._add(
                "embed",
                rows.add_positions(x_TD, positions.weight, at, offset=positions.offset),
            )
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        qkv: Linear[CpuMatrix],
        pattern: Pattern,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = self._buffer("qkv", qkv.matrix.outputs)
        self._linear("attention", qkv, self._normed("attention", x_TD, norm), joined)
        turn = None if rotation is None else self._turn(rotation)
        self._add(
            "attention",
            rotary.rotate_and_cache(
                joined,
                cache,
                heads=pattern.heads,
                blocks=torch.from_numpy(self._inputs.blocks),
                offsets=torch.from_numpy(self._inputs.offsets),
                turn=turn,
                interleaved=rotation is not None and rotation.interleaved,
            ),
        )
        return joined[:, : pattern.heads * cache.keys.shape[3]]

    def attend(self, q_TN: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        out = self._buffer("attended", q_TN.shape[1])
        self._add(
            "attention",
            attention(
                q_TN,
                out,
                cache,
                pattern,
                torch.from_numpy(self._inputs.spans),
                torch.from_numpy(self._inputs.tables),
                self._attention_scratch(pattern, cache),
            ),
        )
        return out

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm,
        up: Linear[CpuMatrix],
        activation: Activation,
        gated: bool,
    ) -> torch.Tensor:
        raw = self._buffer("expanded", up.matrix.outputs)
        self._linear("ffn", up, self._normed("ffn", x_TD, norm), raw)
        if not gated:
            self._add("ffn", activations.activate(activation, raw))
            return raw
        h_TF = self._buffer("channels", up.matrix.outputs // 2)
        self._add("ffn", activations.activate_gated(activation, raw, h_TF))
        return h_TF

    def merge(
        self,
        x_TD: torch.Tensor,
        y_TN: torch.Tensor,
        out: Linear[CpuMatrix],
        phase: Literal["attention", "ffn"],
    ) -> torch.Tensor:
        if self._collective.world == 1:
            self._linear(phase, out, y_TN, x_TD, add=True)
            return x_TD
        partial_TD = self._buffer("partial", out.matrix.outputs)
        self._linear(phase, Linear(out.matrix), y_TN, partial_TD)
        self._all_reduce(partial_TD)
        self._add(phase, rows.add(x_TD, partial_TD, bias=out.bias))
        return x_TD

    def logits(self, x_TD: torch.Tensor, norm: Norm, output: CpuMatrix) -> torch.Tensor:
        width = x_TD.shape[1]
        limit = self._limits.sampled
        rows_SD = self._buffer("sampled", width, limit)
        logits_SV = self._buffer("logits", output.outputs, limit)
        at = torch.from_numpy(self._inputs.sampled)
        self._add("output", rows.gather_rows(x_TD, at, rows_SD))
        self._add("output", norms.norm(norm, rows_SD, rows_SD, rows=Header.SAMPLED))
        self._linear("output", Linear(output), rows_SD, logits_SV, counted=Header.SAMPLED)
        return logits_SV

    def _add(self, phase: Phase, instructions: Iterable[Instruction]) -> None:
        self.steps += [(phase, instruction) for instruction in instructions]

    def _linear(
        self,
        phase: Phase,
        linear: Linear[CpuMatrix],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        counted: Header = Header.ROWS,
        add: bool = False,
    ) -> None:
        instructions = matrix.linear(
            linear.matrix,
            x,
            y,
            self._room,
            integers=self._integers,
            bias=linear.bias,
            rows=counted,
            add=add,
        )
        self._add(phase, instructions)

    def _normed(self, phase: Phase, x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
        normed_TD = self._buffer("normed", x_TD.shape[1])
        self._add(phase, norms.norm(norm, x_TD, normed_TD))
        return normed_TD

    def _all_reduce(self, x_TD: torch.Tensor) -> None:
        group = self._collective
        if group.world == 1:
            return
        if isinstance(group, SharedMemory):
            self._add("all_reduce", reduce.all_reduce(group, x_TD))
        else:
            self.steps.append(("all_reduce", _in_python(group, x_TD)))

    def _turn(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the step's positions, computed once for all layers."""
        found = self._turns.get(id(rotation))
        if found is None:
            pairs = rotation.inverse.numel()
            cos = self._buffer(f"cos {len(self._turns)}", pairs)
            sin = self._buffer(f"sin {len(self._turns)}", pairs)
            positions = torch.from_numpy(self._inputs.positions)
            self._add(
                "embed",
                rotary.angles(positions, rotation.inverse, cos, sin, factor=rotation.factor),
            )
            found = self._turns[id(rotation)] = cos, sin
        return found

    def _buffer(self, name: str, width: int, rows: int | None = None) -> torch.Tensor:
        found = self._buffers.get((name, width))
        if found is None:
            found = torch.zeros(rows or self._limits.rows, width)
            self._buffers[name, width] = found
        return found

    def _room(self, size: int) -> torch.Tensor:
        if size not in self._rooms:
            self._rooms[size] = torch.empty(size, dtype=torch.uint8)
        return self._rooms[size]

    def _attention_scratch(self, pattern: Pattern, cache: LayerCache) -> AttentionScratch:
        head_dim = cache.keys.shape[3]
        if head_dim not in self._scratch:
            self._scratch[head_dim] = AttentionScratch(head_dim, self._threads)
        return self._scratch[head_dim]


def _in_python(group: Collective, x_TD: torch.Tensor) -> Callable[[int], None]:
    def all_reduce(rows: int) -> None:
        group.all_reduce(x_TD[:rows])

    return all_reduce
