"""A rank's weights: its own slice of every parameter, and nothing else of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shards.checkpoint.checkpoint import Checkpoint
from shards.checkpoint.pieces import pieces
from shards.errors import CheckpointError
from shards.layout import Layout, Range
from shards.models.family import Source
from shards.models.parameters import Parameter, parameters
from shards.models.source import ModelSource


def load_shard(
    source: ModelSource,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Parameter name -> this rank's slice, contiguous, as `dtype` on `device`.

    The slice of `parameters(spec)` is cut along its axis to `layout.owned(parameter, rank)`; tied
    embeddings have no output.weight. Read in pieces: beside the weights themselves, less than
    200 MB are held at any time. `on_bytes(done, total)` counts bytes of weights as they arrive.

    Raises `CheckpointError` where a file is gone or changed, or a value overflows float16.
    """
    slices = [(p, layout.owned(p, rank)) for p in parameters(source.spec)]
    total = sum(_shape(p, owned).numel() for p, owned in slices) * dtype.itemsize
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_bytes is not None:
            on_bytes(done, total)

    try:
        return {
            p.name: _load(p, owned, source.sources[p.name], source.checkpoint, dtype, device, count)
            for p, owned in slices
        }
    finally:
        source.checkpoint.close()


def _load(
    parameter: Parameter,
    owned: Range,
    source: Source,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    count: Callable[[int], None],
) -> torch.Tensor:
    loaded = torch.empty(_shape(parameter, owned), dtype=dtype, device=device)
    for piece in pieces(parameter, owned, source):
        values = checkpoint.read(source.tensor, piece.window)
        if source.transpose and values.ndim == 2:
            values = values.T
        if source.rope_rows:
            values = _unpair(values, source.rope_rows)
        target = loaded[tuple(slice(r.start, r.stop) for r in piece.target)]
        target.copy_(_convert(values, dtype, source.tensor))
        count(target.numel() * dtype.itemsize)
    return loaded


def _shape(parameter: Parameter, owned: Range) -> torch.Size:
    shape = list(parameter.shape)
    shape[parameter.axis] = len(owned)
    return torch.Size(shape)


def _unpair(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads, head_dim / 2, 2] -> [heads, 2, head_dim / 2], see `Source.rope_rows`."""
    paired = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return paired.transpose(1, 2).reshape(values.shape)


def _convert(values: torch.Tensor, dtype: torch.dtype, tensor: str) -> torch.Tensor:
    converted = values.to(dtype)
    if dtype is torch.float16 and values.dtype is not torch.float16:
        overflown = converted.isinf()
        if overflown.any():
            raise CheckpointError(
                f"tensor {tensor} holds {values[overflown][0].item():g}, and float16 ends at "
                "65504: use --dtype bfloat16 or --dtype float32"
            )
    return converted
