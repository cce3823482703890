"""Which windows of a checkpoint tensor make up a rank's slice of a parameter. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shards.layout import Range
from shards.models.family import Source
from shards.models.parameters import Parameter
from shards.quantization.scheme import BLOCK

# Of a window's rows, in float32: what is held beside the weights while a piece is converted.
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """`window` of the tensor goes to `target` of the slice; one range per axis each.

    Where the source is transposed, the window's axes are the target's in reverse.
    """

    window: tuple[Range, ...]
    target: tuple[Range, ...]


def pieces(parameter: Parameter, owned: Range, source: Source) -> Iterator[Piece]:
    """Cut the slice `owned` (along `parameter.axis`) into pieces of bounded size.

    They cover the slice exactly once. A piece of a source with `rope_rows` holds whole heads; one
    of a matrix holds whole blocks of 32 inputs, but where the slice ends within one.
    """
    rows = owned if parameter.axis == 0 else Range(0, parameter.shape[0])
    if len(parameter.shape) == 1:
        for at, run in _runs(source, rows):
            yield Piece((run,), (Range(at, at + len(run)),))
        return
    columns = owned if parameter.axis == 1 else Range(0, parameter.shape[1])
    for at, run in _runs(source, rows):
        if source.transpose:
            for part in _parts(columns, _step(parameter.shape[0], BLOCK)):
                target = Range(part.start - columns.start, part.stop - columns.start)
                yield Piece((part, run), (Range(at, at + len(run)), target))
        else:
            for part in _parts(run, _step(parameter.shape[1], source.rope_rows)):
                target = Range(at + part.start - run.start, at + part.stop - run.start)
                yield Piece((part, columns), (target, Range(0, len(columns))))


def _runs(source: Source, rows: Range) -> Iterator[tuple[int, Range]]:
    """(where in the slice, contiguous rows of the tensor) of the parameter's `rows`."""
    if not source.block:
        yield 0, Range(source.offset + rows.start, source.offset + rows.stop)
        return
    row = rows.start
    while row < rows.stop:
        block, within = divmod(row, source.block)
        count = min(source.block - within, rows.stop - row)
        start = source.offset + block * source.stride + within
        yield row - rows.start, Range(start, start + count)
        row += count


def _step(width: int, multiple: int = 0) -> int:
    """How many rows of `width` elements a piece takes, whole multiples where one is given."""
    step = max(1, _PIECE_BYTES // (4 * width))
    return max(multiple, step // multiple * multiple) if multiple else step


def _parts(whole: Range, step: int) -> Iterator[Range]:
    for start in range(whole.start, whole.stop, step):
        yield Range(start, min(start + step, whole.stop))
