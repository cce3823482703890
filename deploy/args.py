"""Arguments of the Serve application. No ray: a command checks them before Ray is imported."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import ClusterConfig, ServerConfig
from deploy.autoscaling import Autoscaling
from deploy.telemetry.logs import LogFormat, LogLevel

# In a fleet somebody else answers meanwhile: a replica may take its time to go.
_FLEET_DRAIN_SECONDS = 60.0
# Other numbers of ranks, or other cuts, add up in another order.
_ANSWERS_DEPEND_ON = {
    *("model", "served_name", "tokenizer", "revision", "dtype", "quantization", "max_context"),
    *("device", "tensor_parallel", "capacity", "expert_parallel"),
}


class AppArgs(BaseModel):
    """Arguments of the application.

    There are `replicas` copies of the model, or as many as `autoscaling` says. An update starts
    `max_surge_percent` of them (rounded up) beside the old ones, which needs room for them, and
    retires an old one for each that is ready; with 0, old ones go first. At most
    `rolling_update_percentage` of the replicas, a fraction, retire at a time.

    On a command line (`serve run deploy.app:build model=... grpc_port=...`) the fields of `cluster`
    and `server` are given without their section.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: ClusterConfig
    server: ServerConfig = ServerConfig()
    replicas: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = None
    max_surge_percent: int = Field(default=25, ge=0, le=100)
    rolling_update_percentage: float = Field(default=0.2, gt=0, le=1)
    log_format: LogFormat = "text"
    log_level: LogLevel = "INFO"

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

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> AppArgs:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError(
                f"replicas={self.replicas} and autoscaling exclude each other: give "
                "autoscaling.min_replicas and max_replicas instead"
            )
        return self

    @property
    def version(self) -> str:
        """Equal for replicas whose answers are equal: one may go on where another was lost."""
        config = self.cluster
        told = config.model_dump(mode="json", include=_ANSWERS_DEPEND_ON)
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    def in_fleet(self) -> AppArgs:
        """The same, with a fleet's defaults: a replica drains for a minute, and its connections
        have made way for new ones by half of that."""
        given, server = self.server.model_fields_set, self.server
        drain = server.drain_timeout_s if "drain_timeout_s" in given else _FLEET_DRAIN_SECONDS
        age = server.max_connection_age_s if "max_connection_age_s" in given else max(1, drain / 2)
        update = {"drain_timeout_s": drain, "max_connection_age_s": age}
        return self.model_copy(update={"server": server.model_copy(update=update)})


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
