"""Engines to be measured: one at a time computes, since the cores belong to its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import ClusterConfig
from cluster.engine import Engine
from cluster.ray_environment import prepare_local_ray
from deploy.bench.suite.errors import BenchmarkError


class EngineOptions(BaseModel):
    """What the benchmarks let users choose of `ClusterConfig`; None leaves its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    tensor_parallel: int = 1
    threads_per_rank: int | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    collective: str | None = None
    kv_memory: str | None = None
    max_sequences: int | None = None
    max_step_tokens: int | None = None

    def config(self) -> ClusterConfig:
        """Without the prefix cache, which would answer what is to be computed. Raises
        `BenchmarkError` naming every fault."""
        given: dict[str, Any] = self.model_dump(exclude_none=True)
        try:
            return ClusterConfig.model_validate({**given, "prefix_caching": False})
        except ValidationError as error:
            faults = "; ".join(map(_fault, error.errors(include_url=False)))
            raise BenchmarkError(f"bad options: {faults}") from error

    def but(self, **changes: Any) -> EngineOptions:
        """The same with `changes`."""
        return self.model_copy(update=changes)


@contextmanager
def running(options: EngineOptions) -> Iterator[Engine]:
    """A started engine; start-up is no part of what is measured."""
    with Engine(options.config()) as engine:
        yield engine


@contextmanager
def shared_ray(ranks: int) -> Iterator[None]:
    """One local Ray for several engines, `ranks` ranks up at a time at most: engines that are
    started within use it, which spares each of them Ray's own start."""
    prepare_local_ray()
    from cluster.shard_group import LocalRay

    ray = LocalRay(ranks)
    try:
        yield
    finally:
        ray.stop()


def _fault(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"this version's engines have no {name}"
    return f"{name}={fault['input']!r}: {message[:1].lower()}{message[1:]}" if name else message
