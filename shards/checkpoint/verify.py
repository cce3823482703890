"""Does a checkpoint hold its model's tensors, all of them and no other? By the index alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from shards.checkpoint.checkpoint import BLOCKS, Checkpoint
from shards.errors import CheckpointError, UnsupportedModel
from shards.models.family import Source
from shards.models.parameters import Parameter, parameters
from shards.models.spec import ModelSpec

_LISTED = 10


def resolve(
    sources: Mapping[str, Source], tensors: Iterable[str], prefix: str
) -> dict[str, Source]:
    """`sources` under the names the checkpoint uses: without `prefix` where it holds only those."""
    held = set(tensors)

    def named(source: Source) -> Source:
        bare = source.tensor.removeprefix(prefix)
        if source.tensor not in held and bare in held:
            return replace(source, tensor=bare)
        return source

    return {parameter: named(source) for parameter, source in sources.items()}


def verify(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    sources: Mapping[str, Source],
    ignored: Sequence[str],
    prefix: str,
) -> None:
    """Raise `CheckpointError` listing missing, misshapen and unused tensors.

    `ignored` are regular expressions (full match, on the name without `prefix`) of tensors that may
    be left over. Raises `UnsupportedModel` where a needed tensor has a dtype that cannot be read.
    """
    needed = _needed_shapes(spec, sources)
    tensors = checkpoint.tensors
    missing = [name for name in needed if name not in tensors]
    misshapen = [
        f"{name} is {list(tensors[name].shape)} where the config needs {list(shape)}"
        for name, shape in needed.items()
        if name in tensors and tensors[name].shape != shape
    ]
    left_over = re.compile("|".join(ignored) or "(?!)")
    unused = [
        name
        for name in tensors
        if name not in needed and not left_over.fullmatch(name.removeprefix(prefix))
    ]
    faults = [
        _listing(kind, names)
        for kind, names in (("missing", missing), ("misshapen", misshapen), ("unused", unused))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"the checkpoint does not hold the tensors of its config: {'; '.join(faults)}"
        )
    unreadable = [name for name in needed if tensors[name].dtype not in BLOCKS]
    if unreadable:
        raise UnsupportedModel(
            f"tensor {unreadable[0]} is {tensors[unreadable[0]].dtype} ({len(unreadable)} such "
            f"tensors): readable are {', '.join(BLOCKS)}"
        )


def _needed_shapes(spec: ModelSpec, sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """The shape that the config gives each tensor; a fused one reaches to its last part's end."""
    needed: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(spec):
        source = sources[parameter.name]
        shape = _needed_shape(parameter, source)
        before = needed.get(source.tensor, shape)
        needed[source.tensor] = tuple(max(pair) for pair in zip(before, shape, strict=True))
    return needed


def _needed_shape(parameter: Parameter, source: Source) -> tuple[int, ...]:
    last = parameter.shape[0] - 1
    if source.block:
        last = last // source.block * source.stride + last % source.block
    shape = (source.offset + last + 1, *parameter.shape[1:])
    return shape[::-1] if source.transpose else shape


def _listing(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"
