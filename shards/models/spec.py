"""What a GPT-style model is made of, as data.

A `ModelSpec` says everything the decoder, the layout and `headwise plan` need to know and nothing
about where it came from: a family file (`shards/models/families/`) turns a Hugging Face config into
one. This module is a leaf: no torch, no transformers, so that planning starts in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Mask = Literal["causal", "prefix"]


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


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE: a divisor for each frequency, searched for (arXiv:2402.13753).

    `short` serve contexts up to `original_context`, `long` those beyond, dim / 2 each. Which of
    them is settled by the context that is served, once for all sequences: cached keys stay valid
    as a sequence grows. `attention_factor` multiplies cos and sin.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    attention_factor: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


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
class QKNorm:
    """A norm of queries and of keys before they are rotated, each head by itself.

    The heads share one weight, but where each has its `own`. A `joint` norm's statistics are those
    of all heads' channels together, every channel with its own weight.
    """

    norm: Norm
    own: bool = False
    joint: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention. MHA, GQA and MQA differ in `kv_heads` alone: heads, fewer, one.

    Query head h reads KV head h // (heads // kv_heads). With a `window`, a position sees that many
    positions, itself the last of them. Logits are scale q k; a `softcap` c makes them
    c tanh(logit / c). With `sinks`, each head has a learned logit that joins its softmax and has no
    value. `alibi`: logits fall by the head's slope times the distance (arXiv:2108.12409), slopes
    multiplied by this number. Under the "prefix" mask the positions of the prompt see each other,
    in both directions; those after it see all before them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    rotary: Rotary | None = None
    qk_norm: QKNorm | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: float | None = None
    mask: Mask = "causal"

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1), causal.

    Keys and values of all heads come from one normed latent of `latent` channels: a head's key is
    `nope_dim` channels of it, then `rope_dim` channels that are rotated and the same for all heads;
    its value is `value_dim` channels. Queries come from x, or from a normed latent of their own of
    `query_rank` channels. `scale` includes YaRN's factor where the model has one. With a `bias`,
    what makes the latents, queries' and keys', has one, and so has the output projection.

    What is cached is the latent and the rotated channels, once for all heads. Read in the absorbed
    form (appendix there) this is MQA with keys of `latent` + `rope_dim` channels, whose first
    `latent` are the values: hence `kv_heads` and `head_dim`.
    """

    heads: int
    latent: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    norm: Norm
    rotary: Rotary
    query_rank: int | None = None
    bias: bool = False

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def head_dim(self) -> int:
        """Channels of what is cached."""
        return self.latent + self.rope_dim

    @property
    def window(self) -> None:
        """Every position is seen."""
        return None


@dataclass(frozen=True, slots=True)
class Clamp:
    """GPT-OSS's gate: (up + 1) * gate * sigmoid(alpha * gate), where gate is at most `limit` and up
    within +-limit. It takes the place of the activation."""

    limit: float
    alpha: float


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(act(gate(x)) * up(x)) where `gated`, else down(act(up(x)))."""

    width: int
    activation: Activation
    gated: bool
    bias: bool = False
    clamp: Clamp | None = None


@dataclass(frozen=True, slots=True)
class Router:
    """Which experts a token goes to: those of the `top_k` largest scores.

    Scores are softmax or sigmoid of a linear layer, in float32. With a `correction`, a learned bias
    is added to them for the choice alone (arXiv:2408.15664). With `groups` > 1 only experts of the
    `top_groups` best of so many equal groups are chosen from; a group is as good as its best score,
    or as its best two together (arXiv:2412.19437). An expert's output weighs its score, divided by
    the chosen ones' sum where `renormalise`, times `scale`. (Softmax over the chosen logits alone
    is softmax, renormalised.)
    """

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best two"] = "best"


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """The sum of the experts that a token is routed to, weighed, and of `shared`, which serves
    every token: weighed by a sigmoid of a linear layer where there is a `shared_gate`."""

    experts: int
    expert: FeedForward
    router: Router
    shared: FeedForward | None = None
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: x += attention(norm(x)); x += ffn(norm(x)).

    Each half's norm stands before it (`pre_norm`), after it and before it is added (`post_norm`),
    or at both places. `parallel` halves read the same x, through two norms or through one
    (`shared_norm`): x += attention(norm(x)) + ffn(norm(x)), with one all-reduce. What is added is
    first multiplied by `residual_scale`. With a `stream_norm` each sum is normed in turn, as the
    first Transformer's were (arXiv:1706.03762): x = norm(x + attention(x)); x = norm(x + ffn(x)).
    """

    attention: Attention | LatentAttention
    ffn: FeedForward | MixtureOfExperts
    pre_norm: bool = True
    post_norm: bool = False
    stream_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer.

    `layers` holds one entry per layer, so that layers may differ; equal layers share one object.
    `context` is the longest sequence (prompt + generated) the positions allow. `norm` is what every
    layer's norms and the last one, where there is a `final_norm`, are. Token embeddings are
    multiplied by `embedding_scale`; where `embedding_norm`, they are normed before the first layer.
    Where they have an `embedding_width` of their own, linear layers widen them to `width`, and
    narrow what goes into the output layer. Logits are multiplied by `logit_scale`; a
    `logit_softcap` c then makes them c tanh(logit / c).
    `dtype` is the checkpoint's own: float32, float16 or bfloat16.
    """

    architecture: str
    width: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    norm: Norm
    positions: LearnedPositions | None = None
    tied_embeddings: bool = False
    dtype: str = "float32"
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_width: int | None = None
    final_norm: bool = True
    output_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
