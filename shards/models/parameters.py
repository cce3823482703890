"""Every parameter of a model: its name, full shape, and how it is cut over the ranks.

The one table that loading, planning and the decoder agree on. Names are headwise's own; a family
maps a checkpoint's names onto them (`shards/models/family.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from shards.models.spec import (
    Attention,
    FeedForward,
    LatentAttention,
    Layer,
    MixtureOfExperts,
    ModelSpec,
    Norm,
)


class Cut(Enum):
    """What a parameter is dealt by. REPLICATED parameters are whole on every rank."""

    REPLICATED = "replicated"
    QUERY_HEADS = "query heads"
    KV_HEADS = "kv heads"
    CHANNELS = "ffn channels"
    EXPERT_CHANNELS = "expert channels"
    EXPERT = "expert"
    VOCABULARY = "vocabulary rows"


@dataclass(frozen=True, slots=True)
class Parameter:
    """`shape` is the whole model's. `axis` is the dimension that is cut, in units of `unit` rows
    (head_dim for heads, 1 otherwise). `layer` is None outside the decoder layers.

    An `expert`'s parameters are on the ranks that hold it: cut by EXPERT_CHANNELS, or, with
    Cut.EXPERT, whole on the first of them and nowhere else. `plain` ones are kept as floats.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut = Cut.REPLICATED
    axis: int = 0
    unit: int = 1
    layer: int | None = None
    expert: int | None = None
    plain: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer or of the embedding, [outputs, inputs]: what
        may be quantised. Norms, biases, position tables and routers are not."""
        return len(self.shape) == 2 and not self.plain

    def sliced(self, along_axis: int) -> tuple[int, ...]:
        """The shape of a slice that is `along_axis` long where the parameter is cut."""
        return (*self.shape[: self.axis], along_axis, *self.shape[self.axis + 1 :])


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """All parameters of `spec`, in the order in which a step uses them.

    Column-parallel weights are cut along their outputs (axis 0), row-parallel ones along their
    inputs (axis 1); a row-parallel bias is replicated and added once, after the all-reduce. An
    expert's is added before it, weighed as the expert's output is, and so lies on one rank.
    A model with tied embeddings has no `output.weight`: the output layer uses the embedding rows.
    """
    return tuple(_parameters(spec))


def _parameters(spec: ModelSpec) -> Iterator[Parameter]:
    width, embedded = spec.width, spec.embedding_width or spec.width
    yield Parameter("embedding.weight", (spec.vocabulary, embedded), Cut.VOCABULARY)
    if spec.embedding_width is not None:
        yield Parameter("embedding_projection.weight", (width, embedded))
    if spec.positions is not None:
        yield Parameter("positions.weight", (spec.positions.rows, width), plain=True)
    if spec.embedding_norm:
        yield from _norm("embedding_norm", width, spec.norm)
    for i, layer in enumerate(spec.layers):
        yield from _layer(i, layer, width, spec.norm)
    if spec.final_norm:
        yield from _norm("norm", width, spec.norm)
    if spec.embedding_width is not None:
        yield Parameter("output_projection.weight", (embedded, width))
    if not spec.tied_embeddings:
        yield Parameter("output.weight", (spec.vocabulary, embedded), Cut.VOCABULARY)
    if spec.output_bias:
        yield Parameter("output.bias", (spec.vocabulary,), Cut.VOCABULARY)


def _norm(name: str, width: int, norm: Norm, layer: int | None = None) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,), layer=layer)
    if norm.bias:
        yield Parameter(f"{name}.bias", (width,), layer=layer)


def _layer(i: int, layer: Layer, width: int, norm: Norm) -> Iterator[Parameter]:
    at = f"layers.{i}"
    if layer.pre_norm:
        yield from _norm(f"{at}.attention_norm", width, norm, i)
    if isinstance(layer.attention, LatentAttention):
        yield from _latent_attention(f"{at}.attention", layer.attention, width, i)
    else:
        yield from _attention(f"{at}.attention", layer.attention, width, i)
    if layer.post_norm:
        yield from _norm(f"{at}.attention_post_norm", width, norm, i)
    if layer.stream_norm:
        yield from _norm(f"{at}.attention_stream_norm", width, norm, i)
    if layer.pre_norm and not layer.shared_norm:
        yield from _norm(f"{at}.ffn_norm", width, norm, i)
    if isinstance(layer.ffn, MixtureOfExperts):
        yield from _experts(at, layer.ffn, width, i)
    else:
        yield from _ffn(f"{at}.ffn", layer.ffn, width, i)
    if layer.post_norm:
        yield from _norm(f"{at}.ffn_post_norm", width, norm, i)
    if layer.stream_norm:
        yield from _norm(f"{at}.ffn_stream_norm", width, norm, i)


def _attention(at: str, a: Attention, width: int, i: int) -> Iterator[Parameter]:
    for part, heads, cut in (
        ("q", a.heads, Cut.QUERY_HEADS),
        ("k", a.kv_heads, Cut.KV_HEADS),
        ("v", a.kv_heads, Cut.KV_HEADS),
    ):
        rows = heads * a.head_dim
        yield Parameter(f"{at}.{part}.weight", (rows, width), cut, 0, a.head_dim, i)
        if a.qkv_bias:
            yield Parameter(f"{at}.{part}.bias", (rows,), cut, 0, a.head_dim, i)
    if a.qk_norm is not None:
        shared = not (a.qk_norm.own or a.qk_norm.joint)
        for part, heads, cut in (
            ("q_norm", a.heads, Cut.QUERY_HEADS),
            ("k_norm", a.kv_heads, Cut.KV_HEADS),
        ):
            for kind in ("weight", "bias") if a.qk_norm.norm.bias else ("weight",):
                name = f"{at}.{part}.{kind}"
                if shared:
                    yield Parameter(name, (a.head_dim,), layer=i)
                else:
                    yield Parameter(name, (heads * a.head_dim,), cut, 0, a.head_dim, i)
    if a.sinks:
        yield Parameter(f"{at}.sinks.weight", (a.heads,), Cut.QUERY_HEADS, layer=i)
    shape = (width, a.heads * a.head_dim)
    yield Parameter(f"{at}.out.weight", shape, Cut.QUERY_HEADS, 1, a.head_dim, i)
    if a.out_bias:
        yield Parameter(f"{at}.out.bias", (width,), layer=i)


def _latent_attention(at: str, a: LatentAttention, width: int, i: int) -> Iterator[Parameter]:
    """What makes the latents is replicated: every rank caches them whole."""
    inputs = width
    if a.query_rank is not None:
        inputs = a.query_rank
        yield Parameter(f"{at}.q_down.weight", (inputs, width), layer=i)
        if a.bias:
            yield Parameter(f"{at}.q_down.bias", (inputs,), layer=i)
        yield from _norm(f"{at}.q_norm", inputs, a.norm, i)
    per_head = a.nope_dim + a.rope_dim
    shape = (a.heads * per_head, inputs)
    yield Parameter(f"{at}.q.weight", shape, Cut.QUERY_HEADS, 0, per_head, i)
    yield Parameter(f"{at}.kv_down.weight", (a.latent + a.rope_dim, width), layer=i)
    if a.bias:
        yield Parameter(f"{at}.kv_down.bias", (a.latent + a.rope_dim,), layer=i)
    yield from _norm(f"{at}.kv_norm", a.latent, a.norm, i)
    for part, dim in (("k_up", a.nope_dim), ("v_up", a.value_dim)):
        shape = (a.heads * dim, a.latent)
        yield Parameter(
            f"{at}.{part}.weight", shape, Cut.QUERY_HEADS, 0, dim, i, plain=True
        )  # absorbed into queries and outputs head by head, not multiplied as a layer
    shape = (width, a.heads * a.value_dim)
    yield Parameter(f"{at}.out.weight", shape, Cut.QUERY_HEADS, 1, a.value_dim, i)
    if a.bias:
        yield Parameter(f"{at}.out.bias", (width,), layer=i)


def _ffn(at: str, f: FeedForward, width: int, i: int) -> Iterator[Parameter]:
    for part in ("gate", "up") if f.gated else ("up",):
        yield Parameter(f"{at}.{part}.weight", (f.width, width), Cut.CHANNELS, layer=i)
        if f.bias:
            yield Parameter(f"{at}.{part}.bias", (f.width,), Cut.CHANNELS, layer=i)
    yield Parameter(f"{at}.down.weight", (width, f.width), Cut.CHANNELS, 1, layer=i)
    if f.bias:
        yield Parameter(f"{at}.down.bias", (width,), layer=i)


def _experts(at: str, m: MixtureOfExperts, width: int, i: int) -> Iterator[Parameter]:
    yield Parameter(f"{at}.router.weight", (m.experts, width), layer=i, plain=True)
    if m.router.bias:
        yield Parameter(f"{at}.router.bias", (m.experts,), layer=i)
    if m.router.correction:
        yield Parameter(f"{at}.router.correction", (m.experts,), layer=i)
    f, cut = m.expert, Cut.EXPERT_CHANNELS
    for e in range(m.experts):
        expert = f"{at}.experts.{e}"
        for part in ("gate", "up") if f.gated else ("up",):
            name = f"{expert}.{part}"
            yield Parameter(f"{name}.weight", (f.width, width), cut, layer=i, expert=e)
            if f.bias:
                yield Parameter(f"{name}.bias", (f.width,), cut, layer=i, expert=e)
        yield Parameter(f"{expert}.down.weight", (width, f.width), cut, 1, layer=i, expert=e)
        if f.bias:
            yield Parameter(f"{expert}.down.bias", (width,), Cut.EXPERT, layer=i, expert=e)
    if m.shared is not None:
        if m.shared_gate:
            yield Parameter(f"{at}.shared_gate.weight", (1, width), layer=i, plain=True)
        yield from _ffn(f"{at}.shared", m.shared, width, i)
