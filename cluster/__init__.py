"""The driver's side of headwise; `Engine` serves a model from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.engine import Engine, Generation
    from cluster.errors import InvalidRequest, Overloaded, StartupError, Unavailable

_HOMES = {
    "ClusterConfig": "cluster.config",
    "Engine": "cluster.engine",
    "Generation": "cluster.engine",
    "InvalidRequest": "cluster.errors",
    "Overloaded": "cluster.errors",
    "StartupError": "cluster.errors",
    "Unavailable": "cluster.errors",
}

__all__ = [
    "ClusterConfig",
    "Engine",
    "Generation",
    "InvalidRequest",
    "Overloaded",
    "StartupError",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the scheduler and the planner start without torch and ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
