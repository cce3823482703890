"""The environment of a Ray of one's own on this machine, read when `ray` is imported or started.

Loopback only; no token file in the user's home; no call home; workers at normal priority, since at
Ray's nice +15 every decode step waits for whatever else runs.
"""

from __future__ import annotations

import os

LOCAL_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "NONE",
}


def prepare_local_ray() -> None:
    """Set it for this process, except where the user has set something else."""
    for name, value in LOCAL_RAY.items():
        os.environ.setdefault(name, value)
