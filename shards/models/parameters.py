"""Every parameter of a model: its name, full shape, and how it is cut over the ranks.

The one table that loading, planning and the decoder agree on. Names are headwise's own; a family
maps a checkpoint's names onto them (`shards/models/family.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from shards.models.spec import ModelSpec, Norm


class Cut(Enum):
    """What a parameter is dealt by. REPLICATED parameters are whole on every rank."""

    REPLICATED = "replicated"
    QUERY_HEADS = "query heads"
    KV_HEADS = "kv heads"
    CHANNELS = "ffn channels"
    VOCABULARY = "vocabulary rows"


@dataclass(frozen=True, slots=True)
class Parameter:
    """`shape` is the whole model's. `axis` is the dimension that is cut, in units of `unit` rows
    (head_dim for heads, 1 otherwise). `layer` is None outside the decoder layers."""

    name: str
    shape: tuple[int, ...]
    cut: Cut = Cut.REPLICATED
    axis: int = 0
    unit: int = 1
    layer: int | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a linear layer or of the embedding, [outputs, inputs]: what
        may be quantised. Norms, biases and position tables are not."""
        return len(self.shape) == 2 and self.cut is not Cut.REPLICATED

    def sliced(self, along_axis: int) -> tuple[int, ...]:
        """The shape of a slice that is `along_axis` long where the parameter is cut."""
        return (*self.shape[: self.axis], along_axis, *self.shape[self.axis + 1 :])


def _norm(name: str, width: int, norm: Norm, layer: int | None = None) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,), layer=layer)
    if norm.bias:
        yield Parameter(f"{name}.bias", (width,), layer=layer)


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """All parameters of `spec`, in the order in which a step uses them.

    Column-parallel weights are cut along their outputs (axis 0), row-parallel ones along their
    inputs (axis 1); a row-parallel bias is replicated and added once, after the all-reduce.
    A model with tied embeddings has no `output.weight`: the output layer uses the embedding rows.
    """
    return tuple(_parameters(spec))


def _parameters(spec: ModelSpec) -> Iterator[Parameter]:
    width = spec.width
    yield Parameter("embedding.weight", (spec.vocabulary, width), Cut.VOCABULARY)
    if spec.positions is not None:
        yield Parameter("positions.weight", (spec.positions.rows, width))
    for i, layer in enumerate(spec.layers):
        at, a, f = f"layers.{i}", layer.attention, layer.ffn
        yield from _norm(f"{at}.attention_norm", width, spec.norm, i)
        for part, heads, cut in (
            ("q", a.heads, Cut.QUERY_HEADS),
            ("k", a.kv_heads, Cut.KV_HEADS),
            ("v", a.kv_heads, Cut.KV_HEADS),
        ):
            rows = heads * a.head_dim
            yield Parameter(f"{at}.attention.{part}.weight", (rows, width), cut, 0, a.head_dim, i)
            if a.qkv_bias:
                yield Parameter(f"{at}.attention.{part}.bias", (rows,), cut, 0, a.head_dim, i)
        shape = (width, a.heads * a.head_dim)
        yield Parameter(f"{at}.attention.out.weight", shape, Cut.QUERY_HEADS, 1, a.head_dim, i)
        if a.out_bias:
            yield Parameter(f"{at}.attention.out.bias", (width,), layer=i)
        yield from _norm(f"{at}.ffn_norm", width, spec.norm, i)
        for part in ("gate", "up") if f.gated else ("up",):
            yield Parameter(f"{at}.ffn.{part}.weight", (f.width, width), Cut.CHANNELS, layer=i)
            if f.bias:
                yield Parameter(f"{at}.ffn.{part}.bias", (f.width,), Cut.CHANNELS, layer=i)
        yield Parameter(f"{at}.ffn.down.weight", (width, f.width), Cut.CHANNELS, 1, layer=i)
        if f.bias:
            yield Parameter(f"{at}.ffn.down.bias", (width,), layer=i)
    yield from _norm("norm", width, spec.norm)
    if not spec.tied_embeddings:
        yield Parameter("output.weight", (spec.vocabulary, width), Cut.VOCABULARY)
