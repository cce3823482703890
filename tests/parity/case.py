"""A row of the parity table; `cases_*.py` beside this file hold the rows."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A tiny model: `tests.models.tiny_model(family, **config)`, compared over each of `worlds`.

    `expert_parallel`: its experts are dealt to the ranks whole, not each cut by its channels.
    """

    name: str
    family: str
    config: dict[str, Any]
    worlds: tuple[int, ...] = (1, 2, 3, 4, 5)
    expert_parallel: bool = False
