"""What keeps a benchmark from running, in one sentence for the user."""

from __future__ import annotations

from shards.errors import HeadwiseError


class BenchmarkError(HeadwiseError):
    """A benchmark that cannot be meant, or cannot run on this machine."""
