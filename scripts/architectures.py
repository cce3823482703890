"""Writes docs/architectures.md from the registry: `python -m scripts.architectures`."""

from __future__ import annotations

from pathlib import Path

from shards.models.registry import FAMILIES

TARGET = Path(__file__).parents[1] / "docs" / "architectures.md"

_HEAD = """# Supported architectures

Written by `python -m scripts.architectures`; a test holds it up to date. Every row is compared with
`transformers` at 1 to 4 ranks in float32, logits and greedy tokens (`tests/parity`).

| family | `architectures` in config.json | `general.architecture` in GGUF |
|---|---|---|
"""


def table() -> str:
    """The page."""
    rows = []
    for family in sorted(FAMILIES, key=lambda family: family.name.lower()):
        names = ", ".join(f"`{name}`" for name in family.architectures)
        gguf = "-" if family.gguf is None else f"`{family.gguf.architecture}`"
        rows.append(f"| {family.name} | {names} | {gguf} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    TARGET.write_text(table())
