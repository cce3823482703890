"""What one step computes, as plain numbers: which tokens, where they stand, what they may see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of a step, sequence after sequence.

    `tokens_T`, `positions_T` int64. `blocks_T` and `offsets_T` int64 say where each token's keys
    and values are written. `spans_S4` int64 has a row for each sequence: the first of its rows in
    the batch, how many they are (one in a decode), the tokens in its cache once this step's are
    written, and its row in `tables`. `tables` int64 [.., B] holds block tables, of whose rows only
    those named by a span mean anything, and of each only as many blocks as its context fills.
    `prompts_S` int64 has the length of each sequence's prompt, for attention that sees a prompt in
    both directions; None where none does.
    """

    tokens_T: Int64
    positions_T: Int64
    blocks_T: Int64
    offsets_T: Int64
    spans_S4: Int64
    tables: Int64
    prompts_S: Int64 | None = None
