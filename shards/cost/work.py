"""What a step has to do: for each rank the bytes to move and the operations to compute, and what
the ranks then tell each other.

A layer is five fused calls, two phases that each end with an all-reduce:

    attention   norm, q, k, v, position and KV write | attention over the cache | output projection
    ffn         norm, gate, up and activation | down

Before the layers lies the embedding with its all-reduce, after them the output layer on the sampled
rows, whose logits meet on rank 0. Weight matrices are taken from the parameter table and the
layout, so that uneven cuts, copies of KV heads and tied embeddings cost here what they cost there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shards.cost.device import Arithmetic
from shards.cost.precision import Precision, held
from shards.footprint import communication
from shards.layout import Layout
from shards.models.parameters import Cut, Parameter, parameters
from shards.models.spec import ModelSpec

Call = Literal["embedding", "qkv", "attention", "out", "gate_up", "down", "output", "sample"]

_LOGIT_BYTES = 4
# Penalties and truncation, softmax, the draw: each goes over the logits once.
_SAMPLING_PASSES = 3


@dataclass(frozen=True, slots=True)
class Chunk:
    """`sequences` of which each computes the positions `start` up to `start + tokens`, and has
    those before it in the KV cache. A decode is one token."""

    start: int
    tokens: int
    sequences: int = 1

    def keys(self, window: int | None) -> int:
        """Positions of one sequence that any of its queries sees."""
        seen = self.start + self.tokens
        return seen if window is None else min(seen, window + self.tokens - 1)

    def pairs(self, window: int | None) -> int:
        """Queries times the keys that each sees, of one sequence."""
        full = self.tokens
        if window is not None:
            full = max(0, min(self.tokens, window - self.start))
        return full * self.start + full * (full + 1) // 2 + (self.tokens - full) * (window or 0)


@dataclass(frozen=True, slots=True)
class Work:
    """One fused call on one rank.

    `streamed` are the bytes to move as the memory system feels them: those of packed weights count
    for more than they are (`Precision.stream_share`). `rows` are those of its matrix product; None
    where there is none, and the arithmetic runs at its full rate.
    """

    call: Call
    streamed: float
    operations: float
    arithmetic: Arithmetic
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """`ranks` has each rank's calls; the exchange begins when the slowest has done them. There are
    `times` such phases in a step."""

    ranks: tuple[tuple[Work, ...], ...]
    all_reduce_bytes: int = 0
    gather_bytes: int = 0
    times: int = 1


@dataclass(frozen=True, slots=True)
class _Matrices:
    """The weights of one call on one rank: bytes (as in `Work`) and elements to read, and values
    per row that come in and go out."""

    streamed: float
    elements: int
    values: int
    arithmetic: Arithmetic


_CALLS: Mapping[str, Call] = {
    "attention_norm": "qkv",
    "attention.q": "qkv",
    "attention.k": "qkv",
    "attention.v": "qkv",
    "attention.out": "out",
    "ffn_norm": "gate_up",
    "ffn.gate": "gate_up",
    "ffn.up": "gate_up",
    "ffn.down": "down",
}
"""By the parameter's name without `layers.N.` and `.weight` or `.bias`."""


class Workload:
    """The work of `spec`, cut by `layout`, in `precision`; made once, asked step by step."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        precision: Precision,
        kind: Literal["cpu", "cuda"],
    ) -> None:
        self._spec, self._layout, self._precision, self._kind = spec, layout, precision, kind
        alike: dict[object, list[int]] = defaultdict(list)
        for i, layer in enumerate(zip(spec.layers, layout.layers, strict=True)):
            alike[layer].append(i)
        # The first of each kind of layer stands for all of that kind.
        self._times = {layers[0]: len(layers) for layers in alike.values()}
        self._matrices = self._weigh()
        self._gather = communication(spec, layout, precision.dtype).gather_bytes

    def step(self, chunks: Sequence[Chunk], sampled: int) -> Iterator[Phase]:
        """A step that computes `chunks` and samples from `sampled` of its rows."""
        rows = sum(chunk.tokens * chunk.sequences for chunk in chunks)
        hidden = rows * self._spec.width * self._precision.value_bytes
        ranks = range(self._layout.world)
        lookup = Work("embedding", 2 * hidden, 0, self._precision.activations)
        yield Phase(((lookup,),) * self._layout.world, all_reduce_bytes=hidden)
        for i, times in self._times.items():
            yield Phase(
                tuple(
                    (
                        self._product(i, "qkv", rank, rows),
                        self._attention(i, rank, chunks),
                        self._product(i, "out", rank, rows),
                    )
                    for rank in ranks
                ),
                all_reduce_bytes=hidden,
                times=times,
            )
            yield Phase(
                tuple(
                    (
                        self._product(i, "gate_up", rank, rows),
                        self._product(i, "down", rank, rows),
                    )
                    for rank in ranks
                ),
                all_reduce_bytes=hidden,
                times=times,
            )
        if sampled:
            yield Phase(
                tuple((self._product(None, "output", rank, sampled),) for rank in ranks),
                gather_bytes=sampled * self._gather,
            )
            logits = _SAMPLING_PASSES * sampled * self._spec.vocabulary * _LOGIT_BYTES
            yield Phase(((Work("sample", logits, 0, "float32"),),))

    def _product(self, layer: int | None, call: Call, rank: int, rows: int) -> Work:
        weights = self._matrices[layer, call, rank]
        return Work(
            call,
            weights.streamed + rows * weights.values * self._precision.value_bytes,
            2 * weights.elements * rows,
            weights.arithmetic,
            rows,
        )

    def _attention(self, layer: int, rank: int, chunks: Sequence[Chunk]) -> Work:
        attention = self._spec.layers[layer].attention
        split = self._layout.layers[layer]
        heads = len(split.heads[rank]) * attention.head_dim
        kv_heads = len(split.kv_heads[rank]) * attention.head_dim
        window = attention.window
        # Keys and values; queries and what comes out.
        values = sum(
            chunk.sequences * 2 * (chunk.keys(window) * kv_heads + chunk.tokens * heads)
            for chunk in chunks
        )
        pairs = sum(chunk.sequences * chunk.pairs(window) for chunk in chunks)
        return Work(
            "attention",
            values * self._precision.value_bytes,
            4 * pairs * heads,
            self._precision.activations,
        )

    def _weigh(self) -> dict[tuple[int | None, Call, int], _Matrices]:
        """The weights of every call, of one layer of each kind."""
        calls: dict[tuple[int | None, Call], list[Parameter]] = defaultdict(list)
        for p in parameters(self._spec):
            call = _call_of(p, self._spec)
            if call is not None and (p.layer is None or p.layer in self._times):
                calls[p.layer, call].append(p)
        return {
            (layer, call, rank): self._matrices_of(weights, rank)
            for (layer, call), weights in calls.items()
            for rank in range(self._layout.world)
        }

    def _matrices_of(self, weights: Sequence[Parameter], rank: int) -> _Matrices:
        streamed, elements, values = 0.0, 0, self._spec.width
        arithmetic = self._precision.activations
        for p in weights:
            here = held(p, self._layout, rank)
            streamed += here * self._precision.weight_bytes(p) / self._precision.stream_share(p)
            if p.cut is not Cut.REPLICATED and len(p.shape) == 2:
                elements += here
                values += len(self._layout.owned(p, rank))
                arithmetic = self._precision.arithmetic(p, self._kind)
        return _Matrices(streamed, elements, values, arithmetic)


def _call_of(parameter: Parameter, spec: ModelSpec) -> Call | None:
    """The call that reads all of `parameter`; None for tables of which a step reads single rows."""
    name = parameter.name.rpartition(".")[0]
    if parameter.layer is not None:
        return _CALLS[name.removeprefix(f"layers.{parameter.layer}.")]
    read = ("norm", "embedding") if spec.tied_embeddings else ("norm", "output")
    return "output" if name in read else None
