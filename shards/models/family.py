"""What a model family has to say: one small object per family, all data.

`Source` says where one of headwise's parameters lies in a checkpoint; `Family` bundles the two
mappings (config -> `ModelSpec`, parameter -> `Source`) for Hugging Face folders and GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shards.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies in a checkpoint tensor.

    The parameter's row r (axis 0, after undoing `transpose`) is the tensor's row
    `offset + (r // block) * stride + r % block`; block 0 means one contiguous run. So a fused
    [q; k; v] is an offset, and a per-head interleaved [heads, 3, head_dim] is block=head_dim,
    stride=3*head_dim.
    `rope_rows`: GGUF stores Llama's q and k rows pairwise within each head; where non-zero, it is
    the head_dim over which [head_dim/2, 2] is turned back into [2, head_dim/2].
    """

    tensor: str
    transpose: bool = False
    offset: int = 0
    block: int = 0
    stride: int = 0
    rope_rows: int = 0


@dataclass(frozen=True, slots=True)
class GGUFNames:
    """How GGUF spells this family.

    `architecture` is the value of `general.architecture`. `config` turns the file's metadata
    (full keys -> values, without the tokenizer's arrays) into the fields of a Hugging Face config.
    """

    architecture: str
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    sources: Callable[[ModelSpec], dict[str, Source]]


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
