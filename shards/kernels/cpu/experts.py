"""A mixture of experts as one instruction: a step inside the step for each expert that has tokens.

An expert's tokens are gathered into rows of their own, go through the same kernels as any other
linear layer, and are added to their tokens' sums. Experts without tokens cost a look at their
count. Routing itself is a Python call of the reference's code, so that equal scores fall to the
experts that `torch.topk` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from shards.kernels.base import Experts
from shards.kernels.cpu.barrier import counts, meet
from shards.kernels.cpu.emission import LANES
from shards.kernels.cpu.kernel import Header, Instruction, Kernel, call, operand, share
from shards.kernels.cpu.matrix import CpuMatrix
from shards.kernels.cpu.simd import (
    fma,
    load,
    load_f32,
    load_i64,
    load_part,
    splat,
    store,
    store_i64,
    store_part,
)
from shards.kernels.reference.experts import Sorted, count_tokens, route


class Pairs:
    """Of tokens and their experts, sorted by expert: `starts` int64 [experts + 1], `tokens` int64
    and `weights` float32 [most pairs]."""

    def __init__(self, experts: int, most: int) -> None:
        self.starts = torch.zeros(experts + 1, dtype=torch.int64)
        self.tokens = torch.zeros(most, dtype=torch.int64)
        self.weights = torch.zeros(most)


def routing(
    experts: Experts[CpuMatrix], logits_TE: torch.Tensor, pairs: Pairs
) -> Callable[[int], None]:
    """What fills `pairs`, given the rows of the step."""

    def run(rows: int) -> None:
        chosen_TX, weights_TX = route(logits_TE[:rows], experts.correction, experts.choice)
        count_tokens(chosen_TX, experts.load)
        found = Sorted.of(chosen_TX, weights_TX, experts.first, experts.count)
        pairs.tokens[: len(found.tokens_P)] = found.tokens_P
        pairs.weights[: len(found.weights_P)] = found.weights_P
        pairs.starts[1:] = found.ends_E

    return run


class RowOperand(IntEnum):
    """Of gathering and adding; addresses, unless said otherwise."""

    STARTS = 0  # int64 [2]: where the expert's pairs begin and end
    TOKENS = 1  # int64 [pairs]
    WEIGHTS = 2  # float32 [pairs]
    OF_TOKENS = 3  # float32 [rows, width]: x, or the sums
    TOKEN_BYTES = 4  # from row to row
    OF_PAIRS = 5  # float32 [rows, width]: the expert's own rows
    PAIR_BYTES = 6  # from row to row
    WIDTH = 7  # a number


def gather(pairs: Pairs, expert: int, x_TD: torch.Tensor, rows_PD: torch.Tensor) -> Instruction:
    """rows_PD = the expert's tokens of x."""
    return _rows(_GATHER, pairs, expert, x_TD, rows_PD)


def add_weighed(
    pairs: Pairs, expert: int, rows_PD: torch.Tensor, sums_TD: torch.Tensor
) -> Instruction:
    """sums[token] += weight * row, of the expert's pairs."""
    return _rows(_ADD_WEIGHED, pairs, expert, sums_TD, rows_PD)


def _rows(
    kernel: Kernel, pairs: Pairs, expert: int, of_tokens: torch.Tensor, of_pairs: torch.Tensor
) -> Instruction:
    operands = {
        RowOperand.STARTS: pairs.starts.data_ptr() + 8 * expert,
        RowOperand.TOKENS: pairs.tokens.data_ptr(),
        RowOperand.WEIGHTS: pairs.weights.data_ptr(),
        RowOperand.OF_TOKENS: of_tokens.data_ptr(),
        RowOperand.TOKEN_BYTES: 4 * of_tokens.stride(0),
        RowOperand.OF_PAIRS: of_pairs.data_ptr(),
        RowOperand.PAIR_BYTES: 4 * of_pairs.stride(0),
        RowOperand.WIDTH: of_tokens.shape[1],
    }
    keeps = (pairs, of_tokens, of_pairs)
    return Instruction(kernel, tuple(operands[name] for name in RowOperand), keeps)


def _gather(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    start = load_i64(operand(operands, RowOperand.STARTS))
    width = operand(operands, RowOperand.WIDTH)
    first, stop = share(operand(step, Header.ROWS), 1, thread, threads)
    for row in range(first, stop):
        token = load_i64(operand(operands, RowOperand.TOKENS) + 8 * (start + row))
        x = operand(operands, RowOperand.OF_TOKENS)
        x += token * operand(operands, RowOperand.TOKEN_BYTES)
        y = operand(operands, RowOperand.OF_PAIRS) + row * operand(operands, RowOperand.PAIR_BYTES)
        whole = width // LANES * LANES
        for i in range(0, 4 * whole, 4 * LANES):
            store(y + i, load(x + i))
        if whole < width:
            store_part(y + 4 * whole, load_part(x + 4 * whole, width - whole), width - whole)
    return 0


def _add_weighed(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    """Threads share the channels, so that a token's pairs are added in one order."""
    start = load_i64(operand(operands, RowOperand.STARTS))
    first, stop = share(operand(operands, RowOperand.WIDTH), LANES, thread, threads)
    whole = first + (stop - first) // LANES * LANES
    for row in range(operand(step, Header.ROWS)):
        pair = start + row
        token = load_i64(operand(operands, RowOperand.TOKENS) + 8 * pair)
        weight = splat(load_f32(operand(operands, RowOperand.WEIGHTS) + 4 * pair))
        y = operand(operands, RowOperand.OF_TOKENS)
        y += token * operand(operands, RowOperand.TOKEN_BYTES)
        x = operand(operands, RowOperand.OF_PAIRS) + row * operand(operands, RowOperand.PAIR_BYTES)
        for i in range(4 * first, 4 * whole, 4 * LANES):
            store(y + i, fma(weight, load(x + i), load(y + i)))
        if whole < stop:
            i, rest = 4 * whole, stop - whole
            store_part(y + i, fma(weight, load_part(x + i, rest), load_part(y + i, rest)), rest)
    return 0


_GATHER, _ADD_WEIGHED = Kernel(_gather), Kernel(_add_weighed)


class EachOperand(IntEnum):
    """Addresses, unless said otherwise."""

    TABLE = 0  # int64 [experts, instructions, 2]: kernel, operands
    INSTRUCTIONS = 1  # a number, of each expert
    EXPERTS = 2  # a number
    STARTS = 3  # int64 [experts + 1]
    HEADER = 4  # int64 [Header]: of the step inside the step
    COUNTS = 5  # see `barrier.counts`


def each_expert(
    instructions: Sequence[Sequence[Instruction]], pairs: Pairs, threads: int
) -> Instruction:
    """One after another, the instructions of every expert that has tokens, its rows the step's.

    Each expert has as many instructions. They never fail.
    """
    own = [[np.array(one.operands, np.int64) for one in of_expert] for of_expert in instructions]
    table = np.array(
        [
            [(one.kernel.address, at.ctypes.data) for one, at in zip(of_expert, ats, strict=True)]
            for of_expert, ats in zip(instructions, own, strict=True)
        ],
        np.int64,
    )
    header, shared = np.zeros(len(Header), np.int64), counts(threads)
    operands = {
        EachOperand.TABLE: table.ctypes.data,
        EachOperand.INSTRUCTIONS: table.shape[1],
        EachOperand.EXPERTS: table.shape[0],
        EachOperand.STARTS: pairs.starts.data_ptr(),
        EachOperand.HEADER: header.ctypes.data,
        EachOperand.COUNTS: shared.ctypes.data,
    }
    keeps = (table, own, instructions, pairs, header, shared)
    return Instruction(_EACH, tuple(operands[name] for name in EachOperand), keeps)


def _each(operands: Any, step: Any, thread: Any, threads: Any) -> Any:
    starts, header = operand(operands, EachOperand.STARTS), operand(operands, EachOperand.HEADER)
    shared = operand(operands, EachOperand.COUNTS)
    for expert in range(operand(operands, EachOperand.EXPERTS)):
        rows = load_i64(starts + 8 * expert + 8) - load_i64(starts + 8 * expert)
        if rows == 0:
            continue
        if thread == 0:
            store_i64(header + 8 * Header.ROWS, rows)
        if threads > 1:
            meet(shared, thread, threads)
        count = operand(operands, EachOperand.INSTRUCTIONS)
        entries = operand(operands, EachOperand.TABLE) + 16 * count * expert
        for entry in range(entries, entries + 16 * count, 16):
            call(load_i64(entry), load_i64(entry + 8), header, thread, threads)
            if threads > 1:
                meet(shared, thread, threads)
    return 0


_EACH = Kernel(_each)
