"""A rank's weights: its own slice of every parameter, and nothing else of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from shards.checkpoint import mxfp4
from shards.checkpoint.checkpoint import BLOCKS, Checkpoint, TensorInfo
from shards.checkpoint.decode import decode
from shards.checkpoint.pieces import Piece, pieces
from shards.checkpoint.storage import choose_storage
from shards.errors import CheckpointError
from shards.footprint import slice_bytes
from shards.layout import Layout, Range
from shards.models.family import MXFP4_BLOCK, Source
from shards.models.parameters import Parameter, parameters
from shards.models.source import ModelSource
from shards.quantization.choice import Quantization
from shards.quantization.gguf import lower
from shards.quantization.quantize import quantize
from shards.quantization.scheme import GGUF_SCHEMES, Scheme
from shards.quantization.tensor import QuantizedTensor


def load_shard(
    source: ModelSource,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int, int], None] | None = None,
    *,
    quantization: Quantization = "none",
) -> dict[str, torch.Tensor | QuantizedTensor]:
    """Parameter name -> this rank's slice on `device`, contiguous.

    The slice of `parameters(spec)` is cut along its axis to `layout.owned(parameter, rank)`; tied
    embeddings have no output.weight, and experts of other ranks are not here. What `quantization`
    means (`shards/quantization/choice.py`) comes as `QuantizedTensor`, all else in `dtype`. Read in
    pieces: beside the weights themselves, less than 200 MB are held at any time. `on_bytes(done,
    total)` counts bytes of weights as they arrive.

    Raises `CheckpointError` where a file is gone or changed, or a value overflows float16.
    """
    schemes = choose_storage(source, layout, quantization).schemes
    slices = [
        _Slice(p, layout.owned(p, rank), source.sources[p.name], schemes.get(p.name))
        for p in parameters(source.spec)
        if layout.owned(p, rank)
    ]
    total = sum(
        slice_bytes(s.parameter, len(s.owned), str(dtype).removeprefix("torch."), s.scheme)
        for s in slices
    )
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_bytes is not None:
            on_bytes(done, total)

    try:
        return {
            s.parameter.name: (
                s.load_floats(source.checkpoint, dtype, device, count)
                if s.scheme is None
                else s.load_quantized(s.scheme, source.checkpoint, device, count)
            )
            for s in slices
        }
    finally:
        source.checkpoint.close()


@dataclass(frozen=True, slots=True)
class _Slice:
    """What a rank owns of a parameter, where it lies in the checkpoint, and what it becomes."""

    parameter: Parameter
    owned: Range
    source: Source
    scheme: Scheme | None

    def load_floats(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        count: Callable[[int], None],
    ) -> torch.Tensor:
        loaded = torch.empty(self._shape(), dtype=dtype, device=device)
        for piece in self._pieces():
            target = loaded[tuple(slice(r.start, r.stop) for r in piece.target)]
            target.copy_(_convert(self._floats(checkpoint, piece), dtype, piece.tensor))
            count(target.nbytes)
        return loaded

    def load_quantized(
        self,
        scheme: Scheme,
        checkpoint: Checkpoint,
        device: torch.device,
        count: Callable[[int], None],
    ) -> QuantizedTensor:
        rows, inputs = self._shape()
        loaded = QuantizedTensor.empty(scheme, rows, inputs, device)
        stored = checkpoint.tensors[self.source.tensors[0]].dtype
        for piece in self._pieces():
            if GGUF_SCHEMES.get(stored) == scheme and not self.source.transpose:
                values = self._blocks(checkpoint, piece)
            else:
                values = quantize(self._floats(checkpoint, piece).to(device), scheme)
            if not all(plane.isfinite().all() for plane in values.planes[1:]):
                raise CheckpointError(
                    f"tensor {piece.tensor} holds values beyond the reach of {scheme.name}, "
                    "whose scales are float16: use --quantization none"
                )
            down, across = piece.target
            target = loaded.rows(down.start, down.stop).columns(across.start, across.stop)
            count(target.copy_(values).nbytes)
        return loaded

    def _shape(self) -> tuple[int, ...]:
        return self.parameter.sliced(len(self.owned))

    def _pieces(self) -> Iterator[Piece]:
        return pieces(self.parameter, self.owned, self.source)

    def _floats(self, checkpoint: Checkpoint, piece: Piece) -> torch.Tensor:
        if self.source.scales:
            values = _widened_mxfp4(checkpoint, piece, self.source.scales)
        else:
            values = _read(checkpoint, piece.tensor, piece.window, piece.entry)
        if self.source.transpose and values.ndim == 2:
            values = values.T
        values = self._in_order(values[:: piece.every])
        return values + self.source.add if self.source.add else values

    def _blocks(self, checkpoint: Checkpoint, piece: Piece) -> QuantizedTensor:
        """The window in the tensor's own blocks, whose borders may lie wider than `BLOCK`."""
        info = _matrix(checkpoint.tensors[piece.tensor], piece.entry)
        width, _ = BLOCKS[info.dtype]
        rows, inputs = piece.window
        first = inputs.start // width * width
        whole = Range(first, -(-inputs.stop // width) * width)
        values = lower(checkpoint.read_blocks(info, (rows,), whole), info.dtype)
        taken = values.columns(inputs.start - first, inputs.stop - first)
        return taken.permuted(lambda plane: self._in_order(plane[:: piece.every]))

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [heads, head_dim / 2, 2] -> [heads, 2, head_dim / 2], see `Source.rope_rows`."""
        if not self.source.rope_rows:
            return rows
        paired = rows.reshape(-1, self.source.rope_rows // 2, 2, *rows.shape[1:])
        return paired.transpose(1, 2).reshape(rows.shape)


def _matrix(info: TensorInfo, entry: int | None) -> TensorInfo:
    """A tensor, or its `entry` along the first axis, with all axes behind the rows as one."""
    if entry is not None:
        nbytes = info.nbytes // info.shape[0]
        offset = info.offset + entry * nbytes
        info = replace(info, shape=info.shape[1:], offset=offset, nbytes=nbytes)
    if len(info.shape) > 2:
        info = replace(info, shape=(info.shape[0], math.prod(info.shape[1:])))
    return info


def _read(
    checkpoint: Checkpoint, name: str, window: tuple[Range, ...], entry: int | None
) -> torch.Tensor:
    """`Checkpoint.read`, of what `_matrix` says."""
    if entry is None and len(checkpoint.tensors[name].shape) < 3:
        return checkpoint.read(name, window)
    info = _matrix(checkpoint.tensors[name], entry)
    columns = window[-1]
    block, _ = BLOCKS[info.dtype]
    first = columns.start // block * block
    whole = Range(first, -(-columns.stop // block) * block)
    values = decode(checkpoint.read_blocks(info, window[:-1], whole), info.dtype)
    values = values[:, columns.start - first : columns.stop - first]
    return values if len(window) == 2 else values[0]


def _widened_mxfp4(checkpoint: Checkpoint, piece: Piece, scales: str) -> torch.Tensor:
    """float32; see `Source.scales`."""
    rows, inputs = piece.window
    first, last = inputs.start // MXFP4_BLOCK, -(-inputs.stop // MXFP4_BLOCK)
    codes, exponents = (
        _read(checkpoint, name, (rows, Range(first * each, last * each)), piece.entry)
        for name, each in ((piece.tensor, MXFP4_BLOCK // 2), (scales, 1))
    )
    start = inputs.start - first * MXFP4_BLOCK
    return mxfp4.widen(codes, exponents)[:, start : start + len(inputs)]


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
