"""What layers say to a kernel set: a few fused calls a layer, each a whole sentence.

Shape letters: T tokens of the step, S sampled rows, D width, N a rank's query heads, H head_dim,
F a rank's FFN channels, V a rank's vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

from shards.batch import Batch, Int64
from shards.collectives.base import Collective
from shards.kv_cache import LayerCache
from shards.quantization.tensor import QuantizedTensor
from shards.timing import PhaseTimer

Weight = torch.Tensor | QuantizedTensor
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Phase = Literal["attention", "ffn"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a rank's query heads attend.

    `kv_of_head[h]` is the local KV head that local query head h reads; it never falls, but a group
    may be cut short at either end. `scale` multiplies q k. With a `window`, a position sees that
    many positions, itself the last of them.
    """

    kv_of_head: tuple[int, ...]
    scale: float
    window: int | None = None

    @property
    def heads(self) -> int:
        return len(self.kv_of_head)

    @property
    def kv_heads(self) -> int:
        return self.kv_of_head[-1] + 1


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm over D, statistics in float32; `bias` where there is one."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor | None = None


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
    """The token rows `first .. first + matrix.outputs` of the vocabulary, which this rank owns."""

    matrix: M
    first: int


@dataclass(frozen=True, slots=True)
class PositionTable:
    """Learned absolute positions [rows, D]; row = position + offset."""

    weight: torch.Tensor
    offset: int


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
        norm: Norm,
        qkv: Linear[M],
        pattern: Pattern,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Rotated queries [T, N, H] of norm(x); keys and values go into the cache."""
        ...

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        """Causal attention over the cache, softmax in float32: [T, N * H].

        Blocks that lie wholly before a window may hold anything.
        """
        ...

    def expand(
        self, x_TD: torch.Tensor, norm: Norm, up: Linear[M], activation: Activation, gated: bool
    ) -> torch.Tensor:
        """act(gate(norm(x))) * up(norm(x)), [T, F]; `up` then holds gate and up. Else
        act(up(norm(x)))."""
        ...

    def merge(
        self, x_TD: torch.Tensor, y_TN: torch.Tensor, out: Linear[M], phase: Phase
    ) -> torch.Tensor:
        """x + the sum over ranks of out(y), its bias added once. `phase`: what `out` belongs to."""
        ...

    def logits(self, x_SD: torch.Tensor, norm: Norm, output: M) -> torch.Tensor:
        """float32 [S, V] of this rank's vocabulary rows, for the sampled rows of x."""
        ...


class Decodes(Protocol[M]):
    """What a kernel set runs: `shards.models.decoder.Decoder`."""

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

    def vector(self, value: torch.Tensor) -> torch.Tensor:
        """A norm's weight or a bias, in the dtype that the set computes it in."""
        ...

    def allocate(self, blocks: int, kv_heads: int, block_size: int, head_dim: int) -> LayerCache:
        """A layer's pools of so many blocks, zero."""
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
