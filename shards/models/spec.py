"""What a GPT-style model is made of, as data.

A `ModelSpec` says everything the decoder, the layout and `headwise plan` need to know and nothing
about where it came from: a family file (`shards/models/families/`) turns a Hugging Face config into
one. This module is a leaf: no torch, no transformers, so that planning starts in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's wavelength-dependent frequency scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN, NTK-by-parts with attention temperature (arXiv:2309.00071).

    `attention_factor` multiplies cos and sin; the family computes the default 0.1 ln(factor) + 1.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding (arXiv:2104.09864) on the first `dim` channels of every head.

    `interleaved` pairs channels (0, 1), (2, 3).. (GPT-J); otherwise (0, dim/2), (1, dim/2 + 1)..
    (Llama).
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """`rows` absolute positions, added to the token embedding; row = position + offset."""

    rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (arXiv:1910.07467) or LayerNorm; `bias` only where the checkpoint carries one."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention. MHA, GQA and MQA differ in `kv_heads` alone: heads, fewer, one.

    Query head h reads KV head h // (heads // kv_heads). With a `window`, a position sees that many
    positions, itself the last of them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(act(gate(x)) * up(x)) where `gated`, else down(act(up(x)))."""

    width: int
    activation: Activation
    gated: bool
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One pre-norm decoder layer: x += attention(norm(x)); x += ffn(norm(x))."""

    attention: Attention
    ffn: FeedForward


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer.

    `layers` holds one entry per layer, so that layers may differ; equal layers share one object.
    `context` is the longest sequence (prompt + generated) the positions allow.
    `dtype` is the checkpoint's own: float32, float16 or bfloat16.
    """

    architecture: str
    width: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    norm: Norm
    rotary: Rotary | None = None
    positions: LearnedPositions | None = None
    tied_embeddings: bool = False
    dtype: str = "float32"
