"""The tensors of one step: which tokens, where they stand, and where their keys and values go."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows `start..stop` of the batch are consecutive positions of one sequence.

    `table_B`: its block table. `context`: tokens in the cache after this step's are written.
    """

    start: int
    stop: int
    table_B: torch.Tensor
    context: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that are the newest position of one sequence each.

    `rows_S`: where they lie in the batch. `tables_SB`: block tables, padded with block 0.
    `contexts_S`: tokens in each one's cache after this step's are written.
    """

    rows_S: torch.Tensor
    tables_SB: torch.Tensor
    contexts_S: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of a step, sequence after sequence, and how attention reads the cache for them.

    `blocks_T` and `offsets_T` say where each token's keys and values are written.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    blocks_T: torch.Tensor
    offsets_T: torch.Tensor
    decode: DecodeRows | None
    prefills: tuple[PrefillRows, ...]
