"""Settings for a Ray of one's own on this machine, to be made before `ray` is imported.

Loopback only; no token file in the user's home; no call home; workers at normal priority, since at
Ray's nice +15 every decode step waits for whatever else runs.
"""

from __future__ import annotations

import os

_VARIABLES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "GRPC_VERBOSITY": "NONE",
}


def prepare_local_ray() -> None:
    """Set what the user has not set otherwise."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
