"""What a model family has to say: one small object per family, all data.

`Source` says where one of headwise's parameters lies in a checkpoint; `Family` bundles the two
mappings (config -> `ModelSpec`, parameter -> `Source`) for Hugging Face folders and GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shards.models.spec import ModelSpec

MXFP4_BLOCK = 32
"""Elements along the inputs that share an exponent in MXFP4."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies in a checkpoint, and what is done to it on the way.

    The parameter's row r (axis 0, after undoing `transpose`) is the tensor's row
    `offset + (r // block) * stride + r % block`; block 0 means one contiguous run. So a fused
    [q; k; v] is an offset, a per-head interleaved [heads, 3, head_dim] is block=head_dim,
    stride=3*head_dim, and rows of gate and up in turn are block=1, stride=2.
    `stacked`: the tensor has one more axis in front, with an entry for each expert; all else is
    said of the entry of the parameter's own expert.
    `parts`: where non-zero, the parameter's rows are so many equal parts one after another, and all
    else is said of a part. Part p is the tensor whose name has p in place of `{part}`, or, where
    the name has no such place, entry p along the tensor's first axis.
    `scales`: where there is one, `tensor` holds MXFP4 blocks, uint8 [.., rows, inputs / 32, 16],
    and `scales` names their exponents, uint8 [.., rows, inputs / 32]; both become floats.
    `rope_rows`: GGUF stores Llama's q and k rows pairwise within each head; where non-zero, it is
    the head_dim over which [head_dim/2, 2] is turned back into [2, head_dim/2].
    `add` is added to every element: norms whose weight is stored less 1.
    `otherwise`: where it lies in checkpoints that have no such tensor.
    """

    tensor: str
    transpose: bool = False
    offset: int = 0
    block: int = 0
    stride: int = 0
    rope_rows: int = 0
    stacked: bool = False
    parts: int = 0
    scales: str = ""
    add: float = 0.0
    otherwise: Source | None = None

    @property
    def parts_have_names(self) -> bool:
        """Whether each part is a tensor, rather than an entry of one."""
        return "{part}" in self.tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that hold it, without `scales`."""
        if not self.parts_have_names:
            return (self.tensor,)
        return tuple(self.tensor.replace("{part}", str(part)) for part in range(self.parts))


def _nothing(tensors: Collection[str]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class GGUFNames:
    """How GGUF spells this family.

    `architecture` is the value of `general.architecture`. `config` turns the file's metadata
    (full keys -> values, without the tokenizer's arrays) into the fields of a Hugging Face config;
    `shown`, from the names of the file's tensors, gives those that nothing else in it tells.
    `experts`: whether its files have experts, where another family has those without (or with);
    None where the architecture is this family's alone.
    """

    architecture: str
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    sources: Callable[[ModelSpec], dict[str, Source]]
    shown: Callable[[Collection[str]], dict[str, Any]] = _nothing
    experts: bool | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the registry.

    `architectures`: the `architectures` entries of a config.json that it serves.
    `spec`: config fields -> ModelSpec, filling in `transformers`' defaults for those that are not
    there; raises `UnsupportedModel` for an option that the decoder has no part for.
    `sources`: parameter name -> Source, for every name in `parameters(spec)`.
    `prefix`: a module prefix that some checkpoints carry and others do not ("transformer.").
    `ignored`: regular expressions (full match) of checkpoint tensors that hold no weights.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    spec: Callable[[Mapping[str, Any]], ModelSpec]
    sources: Callable[[ModelSpec], dict[str, Source]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    gguf: GGUFNames | None = None
