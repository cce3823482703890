"""Errors that a user can cause and mend: each says what is wrong, the value, and the remedy."""

from __future__ import annotations


class HeadwiseError(Exception):
    """Base of every error headwise raises on purpose; its text is one sentence for the user."""


class IllegalSplit(HeadwiseError, ValueError):
    """A number of ranks or a list of capacities over which the model cannot be dealt."""


class UnsupportedModel(HeadwiseError, ValueError):
    """An architecture, option or quantisation that headwise has no part for."""


class CheckpointError(HeadwiseError):
    """A checkpoint that is missing, truncated, corrupt, or does not hold the model's tensors."""


class NotEnoughMemory(HeadwiseError, MemoryError):
    """Weights or KV cache do not fit into the memory that is there."""


class CollectiveError(HeadwiseError):
    """A collective that did not complete; `rank` is the one that did not arrive, where known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class CollectiveTimeout(CollectiveError):
    """A rank did not arrive within the deadline."""


class CollectiveAborted(CollectiveError):
    """Another party ended this collective's epoch."""
