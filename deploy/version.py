"""Which headwise this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The installed package's version; "0+source" where the code runs from a plain checkout."""
    try:
        return importlib.metadata.version("headwise-cluster")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
