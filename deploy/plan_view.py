"""`headwise plan` for people: tables, and a picture of the heads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.plan_prediction_view import print_prediction
from deploy.plan_report import LayersPlan, PlanReport
from shards.layout import Range

_PICTURE_HEADS = 64
_PICTURE_RANKS = 16
_PICTURE_WIDTH = 72
# Where output is piped there is no width to ask for, and a table must not be cut to 80 columns.
_PIPED_WIDTH = 160


def print_plan(report: PlanReport) -> None:
    """To standard output. One table, or one for each way of cutting where layers differ."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(_summary(report), soft_wrap=True)
    for split in report.splits:
        if len(report.splits) == 1:
            console.print(_table(report, split, totals=True))
        else:
            console.print(f"layers {', '.join(_span(run) for run in split.layers)}")
            console.print(_table(report, split, totals=False))
        for line in picture(split):
            console.print(Text(line, no_wrap=True))
    if any(_shared(split) for split in report.splits):
        console.print("* a KV head that several ranks hold a copy of")
    if len(report.splits) > 1:
        console.print("all layers")
        console.print(_table(report, None, totals=True))
    console.print(_cache_table(report))
    for line in _findings(report):
        console.print(line)
    if report.prediction is not None:
        print_prediction(console, report.prediction, report.tensor_parallel)
    elif report.unpredicted is not None:
        console.print(f"no prediction: {report.unpredicted}", soft_wrap=True)


def _summary(report: PlanReport) -> str:
    layers = sum(len(run) for split in report.splits for run in split.layers)
    return (
        f"{report.model}: {report.architecture}, {report.parameters:,} parameters "
        f"({report.active_parameters:,} used per token), {layers} layers, {report.dtype}, "
        f"{report.bits_per_weight:.4g} bits per weight, "
        f"tensor_parallel={report.tensor_parallel}"
    )


def _table(report: PlanReport, split: LayersPlan | None, *, totals: bool) -> Table:
    columns: dict[str, list[str]] = {
        "rank": [str(rank.rank) for rank in report.ranks],
        "capacity": [f"{rank.capacity:g}" for rank in report.ranks],
    }
    if split is not None:
        columns["query heads"] = [_owned(run) for run in split.heads]
        columns["KV heads"] = [_kv_heads(split, rank.rank) for rank in report.ranks]
        if any(split.channels):
            columns["channels"] = [_owned(run) for run in split.channels]
        if split.experts:
            columns["experts"] = [_owned(run) for run in split.experts]
            columns["channels of each"] = [_owned(run) for run in split.expert_channels]
    if totals:
        columns["vocabulary rows"] = [_owned(rank.vocabulary) for rank in report.ranks]
        columns["weights"] = [_size(rank.weight_bytes) for rank in report.ranks]
        columns["KV per token"] = [_size(rank.kv_bytes_per_token) for rank in report.ranks]
        if report.tokens is not None:
            columns["tokens that fit"] = [
                f"{rank.tokens:,}" if rank.fits else "weights do not fit" for rank in report.ranks
            ]
    table = Table()
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _cache_table(report: PlanReport) -> Table:
    """The KV cache of each kind of layer, beside what it would be with a KV head for every query
    head."""
    table = Table()
    for name in ("attention", "layers", "window", "KV per token and layer", "as MHA"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in report.cache_kinds:
        table.add_row(
            kind.kind,
            str(kind.layers),
            "none" if kind.window is None else f"{kind.window:,}",
            _size(kind.bytes_per_token),
            _size(kind.as_mha),
        )
    return table


def _findings(report: PlanReport) -> Iterator[str]:
    between = report.communication
    if between.all_reduces:
        yield (
            f"communication: {between.all_reduces} all-reduces per step, "
            f"{_size(between.all_reduce_bytes)} per token; "
            f"{_size(between.gather_bytes)} of logits to rank 0 per sampled token"
        )
    yield f"balance: a decode step computes {report.slowdown:.3f} x as long as with a perfect cut"
    if report.tokens is not None:
        yield (
            f"KV cache: {report.tokens:,} tokens fit on the tightest rank, "
            f"{report.sequences:,} sequences of {report.context:,}"
        )


def picture(split: LayersPlan) -> list[str]:
    """Each rank's query heads, and below them the KV heads that they read; two lines per rank.

    Nothing for more heads or ranks than a reader could take in.
    """
    heads = split.heads[-1].stop
    if heads > _PICTURE_HEADS or len(split.heads) > _PICTURE_RANKS:
        return []
    shared = _shared(split)
    group = heads // split.kv_heads[-1].stop
    cell = len(str(heads - 1)) + 2
    fold = _PICTURE_WIDTH // cell * cell
    label = len(f"rank {len(split.heads) - 1}")
    lines = []
    for rank, run in enumerate(split.heads):
        queries = "".join(f"{head:<{cell}}" for head in range(run.start, run.stop))
        keys = ""
        for kv, members in groupby(range(run.start, run.stop), key=lambda head: head // group):
            name = f"{kv}*" if kv in shared else f"{kv}"
            keys += name.ljust(cell * len(list(members)) - 1, "-") + " "
        for at in range(0, len(queries), fold):
            name = "" if at else f"rank {rank}"
            lines.append(f"{name:{label}}  Q   {queries[at : at + fold]}".rstrip())
            lines.append(f"{'':{label}}  KV  {keys[at : at + fold]}".rstrip())
    return lines


def _shared(split: LayersPlan) -> set[int]:
    """KV heads with a copy on more than one rank."""
    held = [kv for run in split.kv_heads for kv in range(run.start, run.stop)]
    return {kv for kv in held if held.count(kv) > 1}


def _kv_heads(split: LayersPlan, rank: int) -> str:
    """`0-1 2* (3)`: those with copies elsewhere one by one, each marked; how many in all."""
    shared = _shared(split)
    run = split.kv_heads[rank]
    parts = []
    for copied, members in groupby(range(run.start, run.stop), key=shared.__contains__):
        kv = list(members)
        parts += [f"{head}*" for head in kv] if copied else [_span(Range(kv[0], kv[-1] + 1))]
    return f"{' '.join(parts)} ({len(run)})"


def _owned(run: Range) -> str:
    return f"{_span(run)} ({len(run)})"


def _span(run: Range) -> str:
    return f"{run.start}" if len(run) == 1 else f"{run.start}-{run.stop - 1}"


def _size(size: int) -> str:
    return ByteSize(size).human_readable(separator=" ")
