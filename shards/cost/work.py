"""What a step has to do: for each rank the bytes to move and the operations to compute, and what
the ranks then tell each other.

A layer is five fused calls, two phases that each end with an all-reduce, or one phase where its
halves are parallel:

    attention   norm, q, k, v, position and KV write | attention over the cache | output projection
    ffn         norm, router, gate, up and activation | down

Of a mixture of experts a step reads those that its tokens are sent to, which are taken to be chosen
evenly and independently.

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
from shards.footprint import communication, share_of_tokens
from shards.layout import Layout
from shards.models.parameters import Parameter, parameters
from shards.models.spec import LatentAttention, ModelSpec

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
    per row that come in and go out. A token takes `share` of them: 1 but for experts."""

    streamed: float
    elements: int
    values: int
    arithmetic: Arithmetic
    share: float = 1.0

    def read(self, rows: int) -> float:
        """The part of them that so many tokens take together."""
        return 1.0 - (1.0 - self.share) ** rows


_CALLS: Mapping[str, Call] = {
    "attention_norm": "qkv",
    "attention_post_norm": "out",
    "attention_stream_norm": "out",
    "attention.q_norm": "qkv",
    "attention.k_norm": "qkv",
    "attention.q_down": "qkv",
    "attention.kv_down": "qkv",
    "attention.kv_norm": "qkv",
    "attention.k_up": "qkv",
    "attention.v_up": "out",
    "attention.sinks": "attention",
    "attention.q": "qkv",
    "attention.k": "qkv",
    "attention.v": "qkv",
    "attention.out": "out",
    "ffn_norm": "gate_up",
    "ffn.gate": "gate_up",
    "ffn.up": "gate_up",
    "ffn.down": "down",
    "ffn_post_norm": "down",
    "ffn_stream_norm": "down",
    "router": "gate_up",
    "experts.gate": "gate_up",
    "experts.up": "gate_up",
    "experts.down": "down",
    "shared_gate": "gate_up",
    "shared.gate": "gate_up",
    "shared.up": "gate_up",
    "shared.down": "down",
}
"""By the parameter's name without `layers.N.`, the number of an expert and `.weight` or `.bias`."""


class Workload:
    """The work of `spec`, cut by `layout`, in `precision`; made once, asked step by step."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        precision: Precision,
        kind: Literal["cpu", "cuda"],
    ) -> None:
        self._spec, self._layout, self._kind = spec, layout, kind
        self._precision = precision.settled(spec, layout)
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
        embedded = hidden * (self._spec.embedding_width or self._spec.width) // self._spec.width
        lookup = Work("embedding", 2 * embedded, 0, self._precision.activations)
        yield Phase(((lookup,),) * self._layout.world, all_reduce_bytes=embedded)
        if self._spec.embedding_width is not None:
            yield Phase(tuple((self._product(None, "embedding", rank, rows),) for rank in ranks))
        for i, times in self._times.items():
            attention: list[tuple[Work, ...]] = [
                (
                    self._product(i, "qkv", rank, rows),
                    self._attention(i, rank, chunks),
                    self._product(i, "out", rank, rows),
                )
                for rank in ranks
            ]
            ffn: list[tuple[Work, ...]] = [
                (self._product(i, "gate_up", rank, rows), self._product(i, "down", rank, rows))
                for rank in ranks
            ]
            halves = [attention, ffn]
            if self._spec.layers[i].parallel:
                halves = [[(*a, *f) for a, f in zip(attention, ffn, strict=True)]]
            for half in halves:
                yield Phase(tuple(half), all_reduce_bytes=hidden, times=times)
        if sampled:
            yield Phase(
                tuple((self._product(None, "output", rank, sampled),) for rank in ranks),
                gather_bytes=sampled * self._gather,
            )
            logits = _SAMPLING_PASSES * sampled * self._spec.vocabulary * _LOGIT_BYTES
            yield Phase(((Work("sample", logits, 0, "float32"),),))

    def _product(self, layer: int | None, call: Call, rank: int, rows: int) -> Work:
        groups = self._matrices[layer, call, rank]
        values = sum(weights.share * weights.values for weights in groups)
        return Work(
            call,
            sum(weights.streamed * weights.read(rows) for weights in groups)
            + rows * values * self._precision.value_bytes,
            sum(2 * weights.elements * weights.share * rows for weights in groups),
            groups[-1].arithmetic,
            rows,
        )

    def _attention(self, layer: int, rank: int, chunks: Sequence[Chunk]) -> Work:
        attention = self._spec.layers[layer].attention
        split = self._layout.layers[layer]
        heads = len(split.heads[rank]) * attention.head_dim
        # Latent attention's values are channels of its keys.
        planes = 1 if isinstance(attention, LatentAttention) else 2
        cached = planes * len(split.kv_heads[rank]) * attention.head_dim
        window = attention.window
        # Keys and values; queries and what comes out.
        values = sum(
            chunk.sequences * (chunk.keys(window) * cached + chunk.tokens * 2 * heads)
            for chunk in chunks
        )
        pairs = sum(chunk.sequences * chunk.pairs(window) for chunk in chunks)
        return Work(
            "attention",
            values * self._precision.value_bytes,
            4 * pairs * heads,
            self._precision.activations,
        )

    def _weigh(self) -> dict[tuple[int | None, Call, int], tuple[_Matrices, ...]]:
        """The weights of every call, of one layer of each kind; experts by themselves, at last."""
        calls: dict[tuple[int | None, Call], list[Parameter]] = defaultdict(list)
        for p in parameters(self._spec):
            call = _call_of(p, self._spec)
            if call is not None and (p.layer is None or p.layer in self._times):
                calls[p.layer, call].append(p)
        return {
            (layer, call, rank): tuple(
                self._matrices_of(group, rank)
                for group in (
                    [p for p in weights if p.expert is None],
                    [p for p in weights if p.expert is not None],
                )
                if group
            )
            for (layer, call), weights in calls.items()
            for rank in range(self._layout.world)
        }

    def _matrices_of(self, weights: Sequence[Parameter], rank: int) -> _Matrices:
        streamed, elements, values = 0.0, 0, self._spec.width
        share = share_of_tokens(weights[0], self._spec)
        arithmetic = self._precision.activations
        for p in weights:
            here = held(p, self._layout, rank)
            streamed += here * self._precision.weight_bytes(p) / self._precision.stream_share(p)
            if len(p.shape) == 2 and here:
                elements += here
                values += len(self._layout.owned(p, rank))
                arithmetic = self._precision.arithmetic(p, self._kind)
        return _Matrices(streamed, elements, values, arithmetic, share)


def _call_of(parameter: Parameter, spec: ModelSpec) -> Call | None:
    """The call that reads all of `parameter`; None for tables of which a step reads single rows."""
    name = parameter.name.rpartition(".")[0]
    if parameter.layer is not None:
        name = name.removeprefix(f"layers.{parameter.layer}.")
        return _CALLS[name.replace(f"experts.{parameter.expert}.", "experts.")]
    if name == "embedding_projection":
        return "embedding"
    matrix = "embedding" if spec.tied_embeddings else "output"
    return "output" if name in ("norm", "output_projection", matrix) else None
