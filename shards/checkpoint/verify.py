"""Does a checkpoint hold its model's tensors, all of them and no other? By the index alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shards.checkpoint.checkpoint import BLOCKS, Checkpoint, TensorInfo
from shards.errors import CheckpointError, UnsupportedModel
from shards.models.family import MXFP4_BLOCK, Source
from shards.models.parameters import Parameter, parameters
from shards.models.spec import ModelSpec

_LISTED = 10
_LAYER = re.compile(r"(?:.*\.)?(?:layers|blk)\.(\d+)\.")
# Joins a token's embedding and hidden state (arXiv:2412.19437, section 2.2).
_DRAFTING = re.compile(r"(?:nextn\.)?eh_proj\.weight")


def resolve(
    sources: Mapping[str, Source], tensors: Iterable[str], prefix: str
) -> dict[str, Source]:
    """`sources` under the names the checkpoint uses: without `prefix` where it holds only those,
    and the one that it holds of each `Source` and what it is `otherwise`."""
    held = set(tensors)

    def spellings(source: Source) -> Iterator[Source]:
        yield source
        yield replace(
            source,
            tensor=source.tensor.removeprefix(prefix),
            scales=source.scales.removeprefix(prefix),
        )
        if source.otherwise is not None:
            yield from spellings(source.otherwise)

    def settled(source: Source) -> Source:
        known = (spelling for spelling in spellings(source) if spelling.tensors[0] in held)
        return replace(next(known, source), otherwise=None)

    return {parameter: settled(source) for parameter, source in sources.items()}


def verify(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    sources: Mapping[str, Source],
    ignored: Sequence[str],
    prefix: str,
) -> None:
    """Raise `CheckpointError` listing missing, misshapen and unused tensors.

    `ignored` are regular expressions (full match, on the name without `prefix`) of tensors that may
    be left over, as may layers beyond the last that draft further tokens (multi-token prediction).
    Raises `UnsupportedModel` where a needed tensor has a dtype that cannot be read.
    """
    needed = _needed_shapes(spec, sources)
    tensors = checkpoint.tensors
    missing = [name for name in needed if name not in tensors]
    misshapen = [
        f"{name} is {list(tensors[name].shape)} where the config needs {list(shape)}"
        for name, shape in needed.items()
        # llama.cpp's quantiser drops a first axis of 1.
        if name in tensors and shape not in (tensors[name].shape, (1, *tensors[name].shape))
    ]
    left_over = re.compile("|".join(ignored) or "(?!)")
    drafting = _drafting_layers(tensors, len(spec.layers))
    unused = [
        name
        for name in tensors
        if name not in needed
        and not left_over.fullmatch(name.removeprefix(prefix))
        and not name.startswith(drafting)
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
    blocks = {name for s in sources.values() if s.scales for name in (s.tensor, s.scales)}
    unreadable = [name for name in needed if not _is_readable(tensors[name], name in blocks)]
    if unreadable:
        raise UnsupportedModel(
            f"tensor {unreadable[0]} is {tensors[unreadable[0]].dtype} ({len(unreadable)} such "
            f"tensors): readable are {', '.join(BLOCKS)}"
        )


def _is_readable(info: TensorInfo, of_mxfp4: bool) -> bool:
    if info.dtype.startswith("F8_") and info.scales is None:
        return False
    return info.dtype in BLOCKS and (info.dtype == "U8") == of_mxfp4


def _needed_shapes(spec: ModelSpec, sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """The shape that the config gives each tensor; a fused one reaches to its last part's end."""
    needed: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(spec):
        for tensor, shape in _shapes(parameter, sources[parameter.name]):
            before = needed.get(tensor, shape)
            needed[tensor] = tuple(max(pair) for pair in zip(before, shape, strict=True))
    return needed


def _shapes(parameter: Parameter, source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What the parameter needs of each tensor that it lies in."""
    last = parameter.shape[0] // (source.parts or 1) - 1
    if source.block:
        last = last // source.block * source.stride + last % source.block
    shape = (source.offset + last + 1, *parameter.shape[1:])
    if source.transpose:
        shape = shape[::-1]
    if source.stacked and parameter.expert is not None:
        shape = (parameter.expert + 1, *shape)
    elif source.parts and not source.parts_have_names:
        shape = (source.parts, *shape)
    if source.scales:
        *rows, inputs = shape
        yield source.scales, (*rows, inputs // MXFP4_BLOCK)
        shape = (*rows, inputs // MXFP4_BLOCK, MXFP4_BLOCK // 2)
    for tensor in source.tensors:
        yield tensor, shape


def _drafting_layers(tensors: Iterable[str], layers: int) -> tuple[str, ...]:
    """What the names of those beyond the last of the `layers` begin with."""
    found = []
    for name in tensors:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= layers and _DRAFTING.fullmatch(name[layer.end() :]):
            found.append(layer[0])
    return tuple(found)


def _listing(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"
