"""A rank's weights: its own slice of every parameter, and nothing else of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from shards.checkpoint.checkpoint import BLOCKS, Checkpoint
from shards.checkpoint.pieces import Piece, pieces
from shards.checkpoint.storage import choose_storage
from shards.errors import CheckpointError
from shards.footprint import slice_bytes
from shards.layout import Layout, Range
from shards.models.family import Source
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
    embeddings have no output.weight. What `quantization` means (`shards/quantization/choice.py`)
    comes as `QuantizedTensor`, all else in `dtype`. Read in pieces: beside the weights themselves,
    less than 200 MB are held at any time. `on_bytes(done, total)` counts bytes of weights as they
    arrive.

    Raises `CheckpointError` where a file is gone or changed, or a value overflows float16.
    """
    schemes = choose_storage(source, layout, quantization).schemes
    slices = [
        _Slice(p, layout.owned(p, rank), source.sources[p.name], schemes.get(p.name))
        for p in parameters(source.spec)
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
            target.copy_(_convert(self._floats(checkpoint, piece), dtype, self.source.tensor))
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
        stored = checkpoint.tensors[self.source.tensor].dtype
        for piece in self._pieces():
            if GGUF_SCHEMES.get(stored) == scheme and not self.source.transpose:
                values = self._blocks(checkpoint, piece)
            else:
                values = quantize(self._floats(checkpoint, piece).to(device), scheme)
            if not all(plane.isfinite().all() for plane in values.planes[1:]):
                raise CheckpointError(
                    f"tensor {self.source.tensor} holds values beyond the reach of {scheme.name}, "
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
        values = checkpoint.read(self.source.tensor, piece.window)
        if self.source.transpose and values.ndim == 2:
            values = values.T
        return self._in_order(values)

    def _blocks(self, checkpoint: Checkpoint, piece: Piece) -> QuantizedTensor:
        """The window in the tensor's own blocks, whose borders may lie wider than `BLOCK`."""
        info = checkpoint.tensors[self.source.tensor]
        width, _ = BLOCKS[info.dtype]
        rows, inputs = piece.window
        first = inputs.start // width * width
        whole = Range(first, -(-inputs.stop // width) * width)
        values = lower(checkpoint.read_blocks(info, (rows,), whole), info.dtype)
        return values.columns(inputs.start - first, inputs.stop - first).permuted(self._in_order)

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [heads, head_dim / 2, 2] -> [heads, 2, head_dim / 2], see `Source.rope_rows`."""
        if not self.source.rope_rows:
            return rows
        paired = rows.reshape(-1, self.source.rope_rows // 2, 2, *rows.shape[1:])
        return paired.transpose(1, 2).reshape(rows.shape)


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
