"""What layers say to a kernel set: a few fused calls a layer, each a whole sentence.

Shape letters: T tokens of the step, S sampled rows, D width, N a rank's query heads, K its KV
heads, H head_dim, F a rank's FFN channels, V a rank's vocabulary rows, L channels of a latent,
R of its rotated part, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kv_cache import LayerCache
from shards.models.spec import Activation, Clamp, Mask, Router
from shards.quantization.tensor import QuantizedTensor
from shards.timing import PhaseTimer

Weight = torch.Tensor | QuantizedTensor
Phase = Literal["attention", "ffn"]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """How a rank's query heads attend.

    `kv_of_head[h]` is the local KV head that local query head h reads; it never falls, but a group
    may be cut short at either end. `scale` multiplies q k. With a `window`, a position sees that
    many positions, itself the last of them. A `softcap` c makes a logit c tanh(logit / c); then it
    falls by its head's slope times the distance. `sinks` are logits that join each head's softmax
    without a value. `slopes` and `sinks` are [N].
    """

    kv_of_head: tuple[int, ...]
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    mask: Mask = "causal"

    @property
    def heads(self) -> int:
        return len(self.kv_of_head)

    @property
    def kv_heads(self) -> int:
        return self.kv_of_head[-1] + 1

    @property
    def is_plain(self) -> bool:
        """Whether it is a scaled softmax of what a causal mask and a window leave, and no more."""
        extras = (self.softcap, self.sinks, self.slopes)
        return self.mask == "causal" and all(extra is None for extra in extras)


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm over D, statistics in float32; `bias` where there is one."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Joint:
    """One statistic for the heads of all ranks: `q_channels` and `k_channels` in all. The first
    `copies` of this rank's KV heads are counted by another rank, which holds them too."""

    q_channels: int
    k_channels: int
    copies: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of queries and of keys, before they are rotated.

    Each head is normed by itself, with a weight [H] for all of them, or with its own part of
    [N * H] or [K * H]. `joint` ones are RMSNorms of the latter kind.
    """

    q: Norm
    k: Norm
    joint: Joint | None = None


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of the first dim = 2 * len(inverse) channels of every head.

    The angle of channel pair i at position p is p * inverse[i], `inverse` float32; `factor`
    multiplies cosine and sine. `interleaved` pairs channels (0, 1), (2, 3).., otherwise
    (0, dim/2), (1, dim/2 + 1)..
    """

    inverse: torch.Tensor
    interleaved: bool
    factor: float = 1.0


class Matrix(Protocol):
    """Packed weights [outputs, inputs] of one or several linear layers, in a set's own order."""

    @property
    def outputs(self) -> int: ...

    @property
    def inputs(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Linear(Generic[M]):
    """`matrix` with the bias of its outputs. A row-parallel bias is added after the all-reduce."""

    matrix: M
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Embedding(Generic[M]):
    """The token rows `first .. first + matrix.outputs` of the vocabulary, which this rank owns.

    Rows are multiplied by `scale`, and by a `projection` [D, inputs of `matrix`] where there is
    one. Once positions are added, they are normed where there is a `norm`.
    """

    matrix: M
    first: int
    scale: float = 1.0
    norm: Norm | None = None
    projection: M | None = None


@dataclass(frozen=True, slots=True)
class PositionTable:
    """Learned absolute positions [rows, D]; row = position + offset."""

    weight: torch.Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class Gating:
    """act(gate) * up, where `gated`; else act(up). A `clamp` takes the activation's place."""

    activation: Activation
    gated: bool
    clamp: Clamp | None = None


@dataclass(frozen=True, slots=True)
class Latent(Generic[M]):
    """Multi-head latent attention: see `shards.models.spec.LatentAttention`.

    `down` gives, of norm(x), what queries are made of, the latent [L] and the rotated channels [R].
    What queries are made of either is them, head by head, or goes through `query_norm` and `query`.
    A query head is [nope + R]. `key_up` is [N, nope, L], `value_up` [N, value, L], in the dtype of
    `KernelSet.vector`; `norm` is the latent's.
    """

    down: Linear[M]
    query_norm: Norm | None
    query: Linear[M] | None
    norm: Norm
    key_up: torch.Tensor
    value_up: torch.Tensor


@dataclass(frozen=True, slots=True)
class Experts(Generic[M]):
    """A rank's share of a mixture of experts: of the experts `first .. first + count`, all of each
    or some of its channels.

    `router` [E, D], with a `router_bias` [E] and a `correction` [E] where there are any. `up` and
    `down` hold the experts' matrices as `KernelSet.pack_experts` packs them: gate and up, or up
    alone, [count, 2 F or F, D]; down [count, D, F]. Biases are [count, 2 F or F] and [count, D]; an
    expert's `down_bias` is on one rank. `load`, int64 [E], counts the tokens sent to each expert.
    """

    router: M
    router_bias: torch.Tensor | None
    correction: torch.Tensor | None
    choice: Router
    first: int
    count: int
    up: M
    up_bias: torch.Tensor | None
    down: M
    down_bias: torch.Tensor | None
    gating: Gating
    load: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part(Generic[M]):
    """A term of what is added to x: out(values), or `values` [T, D] as they are. Either way this
    rank's share of a sum over ranks."""

    values: torch.Tensor
    out: Linear[M] | None = None


@dataclass(frozen=True, slots=True)
class Head(Generic[M]):
    """The last norm, a `projection` [inputs of `linear`, D] and the output layer; the former two
    where there are any. Logits are multiplied by `scale`; a `softcap` c then makes them
    c tanh(logit / c)."""

    norm: Norm | None
    linear: Linear[M]
    scale: float = 1.0
    softcap: float | None = None
    projection: M | None = None


class Sentences(Protocol[M]):
    """One step on one rank. `x_TD` are replicated hidden states; a call may overwrite them.

    A set either computes as it is spoken to, or takes down what to compute and does it later, over
    and over: what a sentence returns is to be given to other sentences and nothing else.
    """

    def embed(self, embedding: Embedding[M], positions: PositionTable | None) -> torch.Tensor:
        """x_TD of the step's tokens: rows of all ranks summed, plus learned positions."""
        ...

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        qkv: Linear[M],
        pattern: Pattern,
        head_norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Rotated queries [T, N, H] of norm(x); keys and values go into the cache."""
        ...

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        """Attention over the cache, softmax in float32: [T, N * H].

        Blocks that lie wholly before a window may hold anything.
        """
        ...

    def attend_latent(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        latent: Latent[M],
        pattern: Pattern,
        rotation: Rotation,
        cache: LayerCache,
    ) -> torch.Tensor:
        """`project` and `attend` of latent attention, whose cache is as `KernelSet.allocate` lays
        it out with a `value_dim`: [T, N * value]."""
        ...

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        up: Linear[M],
        gating: Gating,
        token_gate: M | None = None,
    ) -> torch.Tensor:
        """[T, F] of norm(x), `gating` over gate and up, which `up` then holds, or over up alone;
        times the sigmoid of `token_gate` [1, D] where there is one."""
        ...

    def mix(self, x_TD: torch.Tensor, norm: Norm | None, experts: Experts[M]) -> torch.Tensor:
        """Of each token's experts, this rank's share of their weighed sum: [T, D].

        Scores are float32, computed alike on every rank; among equal ones `torch.topk` chooses.
        """
        ...

    def merge(
        self,
        x_TD: torch.Tensor,
        parts: Sequence[Part[M]],
        phase: Phase,
        *,
        post_norm: Norm | None = None,
        scale: float = 1.0,
        stream_norm: Norm | None = None,
    ) -> torch.Tensor:
        """stream_norm(x + scale * post_norm(the parts' sum over ranks, each bias added once)), with
        the norms that there are. One all-reduce.

        `phase`: what the parts belong to.
        """
        ...

    def logits(self, x_SD: torch.Tensor, head: Head[M]) -> torch.Tensor:
        """float32 [S, V] of this rank's vocabulary rows, for the sampled rows of x."""
        ...


class Decodes(Protocol[M]):
    """What a kernel set runs: `shards.models.decoder.Decoder`."""

    @property
    def patterns(self) -> Sequence[Pattern]:
        """How each layer attends."""
        ...

    def hidden(self, step: Sentences[M], caches: Sequence[LayerCache]) -> torch.Tensor:
        """x_TD after the last layer."""
        ...

    def logits(self, step: Sentences[M], x_SD: torch.Tensor) -> torch.Tensor:
        """float32 [S, V]."""
        ...


class Executor(Protocol):
    """A decoder made ready for one epoch: its caches, its group, its largest step."""

    def forward(self, batch: Batch, timer: PhaseTimer) -> None:
        """Compute a step's hidden states and keep them."""
        ...

    def logits(self, rows_S: Int64, timer: PhaseTimer) -> torch.Tensor:
        """float32 [S, V] of these rows of the last step; valid until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one step may hold: rows, sequences, blocks of a sequence's table, and rows
    whose logits are asked for at a time."""

    rows: int
    sequences: int
    blocks: int
    sampled: int


class KernelSet(Protocol[M]):
    """How one kind of device computes."""

    def pack(self, weights: Sequence[Weight]) -> M:
        """Matrices [outputs, inputs] with the same inputs, side by side along their outputs.

        Takes them over: the caller drops what it gave.
        """
        ...

    def pack_experts(self, experts: Sequence[Sequence[Weight]]) -> M:
        """The same for several experts of one shape, each with its own inputs: expert after expert
        along the outputs. For `Experts` alone."""
        ...

    def vector(self, value: torch.Tensor) -> torch.Tensor:
        """A norm's weight, a bias or another small operand, in the dtype the set computes it in."""
        ...

    def allocate(
        self,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> LayerCache:
        """A layer's pools of so many blocks, zero. With a `value_dim`, values are the first
        so many channels of keys, and take no memory of their own."""
        ...

    def executor(
        self,
        decoder: Decodes[M],
        caches: Sequence[LayerCache],
        collective: Collective,
        limits: Limits,
    ) -> Executor:
        """Make a decoder of this set's matrices ready for an epoch."""
        ...
