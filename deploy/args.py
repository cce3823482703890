"""Arguments of the Serve application. No ray: a command checks them before Ray is imported."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import ClusterConfig, ServerConfig
from deploy.telemetry import LogFormat


class AppArgs(BaseModel):
    """Arguments of the application.

    On a command line (`serve run deploy.app:build model=... grpc_port=...`) the fields of `cluster`
    and `server` are given without their section.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: ClusterConfig
    server: ServerConfig = ServerConfig()
    replicas: int = Field(default=1, ge=1)
    log_format: LogFormat = "text"

    @model_validator(mode="before")
    @classmethod
    def _into_sections(cls, data: object) -> object:
        if not isinstance(data, dict) or "cluster" in data:
            return data
        sections: dict[str, Any] = {"cluster": {}, "server": {}}
        for name, value in data.items():
            if name in ClusterConfig.model_fields:
                sections["cluster"][name] = value
            elif name in ServerConfig.model_fields:
                sections["server"][name] = value
            else:
                sections[name] = value
        return sections


END = b"end\n"
"""The last line that `deploy.local` sends to the process that runs Ray: it removes the directory
itself. Where the pipe ends without it, that process is all that is left."""


class LocalRun(BaseModel):
    """The first line; `directory` takes sockets and logs."""

    args: AppArgs
    directory: str


def flattened(data: dict[str, Any]) -> dict[str, Any]:
    """The same arguments without sections; no two fields share a name."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if name in ("cluster", "server") and isinstance(value, dict):
            flat |= value
        else:
            flat[name] = value
    return flat
