"""Which windows of checkpoint tensors make up a rank's slice of a parameter. Arithmetic only."""

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

    Of the window's rows, one in `every` does, the first to begin with. Where the source is
    transposed, the window's axes are the target's in reverse. `entry`: the place along the tensor's
    first axis, which the window does not speak of, where it has one more than the parameter.
    """

    tensor: str
    window: tuple[Range, ...]
    target: tuple[Range, ...]
    every: int = 1
    entry: int | None = None


def pieces(parameter: Parameter, owned: Range, source: Source) -> Iterator[Piece]:
    """Cut the slice `owned` (along `parameter.axis`) into pieces of bounded size.

    They cover the slice exactly once. A piece of a source with `rope_rows` holds whole heads; one
    of a matrix holds whole blocks of 32 inputs, but where the slice ends within one.
    """
    rows = owned if parameter.axis == 0 else Range(0, parameter.shape[0])
    columns = None
    if len(parameter.shape) == 2:
        columns = owned if parameter.axis == 1 else Range(0, parameter.shape[1])
    if not owned:
        return
    for at, part in _parts_of(parameter, rows, source):
        for run in _runs(source, part.rows):
            yield from _cut(parameter, source, part, run, at, columns)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one tensor, or of one entry of it, as `Source.offset` and the like count them."""

    tensor: str
    entry: int | None
    rows: Range


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows `first`, `first + every`.. of a tensor, `count` of them; `at` is where they go."""

    at: int
    first: int
    count: int
    every: int

    def rows(self, part: Range) -> Range:
        """The tensor's rows from the first to the last of a part of the run."""
        return Range(
            self.first + part.start * self.every, self.first + (part.stop - 1) * self.every + 1
        )


def _parts_of(parameter: Parameter, rows: Range, source: Source) -> Iterator[tuple[int, _Part]]:
    """Where in the slice, and what of which tensor."""
    if not source.parts:
        yield 0, _Part(source.tensor, parameter.expert if source.stacked else None, rows)
        return
    each = parameter.shape[0] // source.parts
    named = source.parts_have_names
    for part in range(rows.start // each, -(-rows.stop // each)):
        start, stop = max(rows.start, part * each), min(rows.stop, (part + 1) * each)
        tensor = source.tensors[part if named else 0]
        within = Range(start - part * each, stop - part * each)
        yield start - rows.start, _Part(tensor, None if named else part, within)


def _runs(source: Source, rows: Range) -> Iterator[_Run]:
    if not source.block:
        yield _Run(0, source.offset + rows.start, len(rows), 1)
    elif source.block == 1:
        yield _Run(0, source.offset + rows.start * source.stride, len(rows), source.stride)
    else:
        row = rows.start
        while row < rows.stop:
            block, within = divmod(row, source.block)
            count = min(source.block - within, rows.stop - row)
            start = source.offset + block * source.stride + within
            yield _Run(row - rows.start, start, count, 1)
            row += count


def _cut(
    parameter: Parameter,
    source: Source,
    part: _Part,
    run: _Run,
    at: int,
    columns: Range | None,
) -> Iterator[Piece]:
    """`columns` are those of a matrix; a vector has none."""
    at += run.at
    whole = Range(0, run.count)
    if columns is None:
        target = (Range(at, at + run.count),)
        yield Piece(part.tensor, (run.rows(whole),), target, run.every, part.entry)
    elif source.transpose:
        down = Range(at, at + run.count)
        for cut in _ranges(columns, _step(parameter.shape[0] * run.every, BLOCK)):
            across = Range(cut.start - columns.start, cut.stop - columns.start)
            window = (cut, run.rows(whole))
            yield Piece(part.tensor, window, (down, across), run.every, part.entry)
    else:
        step = _step(parameter.shape[1] * run.every, source.rope_rows)
        across = Range(0, len(columns))
        for cut in _ranges(whole, step):
            down = Range(at + cut.start, at + cut.stop)
            window = (run.rows(cut), columns)
            yield Piece(part.tensor, window, (down, across), run.every, part.entry)


def _step(width: int, multiple: int = 0) -> int:
    """How many rows of `width` elements a piece takes, whole multiples where one is given."""
    step = max(1, _PIECE_BYTES // (4 * width))
    return max(multiple, step // multiple * multiple) if multiple else step


def _ranges(whole: Range, step: int) -> Iterator[Range]:
    for start in range(whole.start, whole.stop, step):
        yield Range(start, min(start + step, whole.stop))
