"""What the cost model refuses."""

from __future__ import annotations

from shards.errors import HeadwiseError


class CannotPredict(HeadwiseError, ValueError):
    """A device, link or format that the cost model does not know, or numbers that nothing runs."""
