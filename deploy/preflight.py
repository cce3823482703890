"""What can be known to fail before anything is started; Ray alone takes five seconds to start."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from cluster.blueprint import Blueprint, draw_up
from cluster.config import ClusterConfig, ServerConfig
from cluster.errors import StartupError
from cluster.text import TextCodec
from deploy.edge.http.server import bind
from deploy.edge.limits import read_limits
from deploy.edge.security import Access
from deploy.edge.server import port_taken
from shards.checkpoint.locate import is_hub_id
from shards.errors import CheckpointError, NotEnoughMemory

# Of a process of its own: torch would stay in this one's memory for as long as it serves.
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


def check(cluster: ClusterConfig, server: ServerConfig) -> None:
    """Raises `HeadwiseError` with the one sentence the user needs. Reads no weights."""
    _check_port(server)
    if server.http:
        bind(server).close()
    Access(server)
    if server.limits_file is not None:
        read_limits(server.limits_file)
    if server.trace:
        # As the replica will, which would otherwise say so only when its ranks hold their weights.
        from deploy.telemetry.otel import provider_from_environment

        provider_from_environment().shutdown()
    _check_cache(draw_up(cluster))
    if cluster.tokenizer is not None:
        _check_tokenizer(cluster.tokenizer, cluster.revision)
    if cluster.device == "cuda":
        require_gpus(cluster, _gpus_here())


def require_gpus(cluster: ClusterConfig, there: int) -> None:
    """Raise `StartupError` where the ranks need more GPUs than `there` are."""
    if cluster.device != "cuda" or there >= cluster.tensor_parallel:
        return
    fewer = f"tensor_parallel <= {there} or " if there else ""
    raise StartupError(
        f"tensor_parallel={cluster.tensor_parallel} on cuda needs a GPU for each rank and this "
        f"machine has {there}: use {fewer}device=cpu"
    )


def _check_port(server: ServerConfig) -> None:
    try:
        addresses = socket.getaddrinfo(server.host, server.grpc_port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise port_taken(server) from error


def _check_cache(blueprint: Blueprint) -> None:
    given = blueprint.config.kv_memory
    block = max(blueprint.block_bytes)
    if given is not None and given < block:
        raise NotEnoughMemory(
            f"kv_memory={int(given)}: a KV block of {blueprint.config.block_size} tokens takes "
            f"{block:,} bytes on rank {blueprint.block_bytes.index(block)}; give each rank at "
            "least that, and as much for every further block"
        )


def _check_tokenizer(tokenizer: str, revision: str | None) -> None:
    """Reads it whole: only those who give one wait for that."""
    path = Path(tokenizer)
    if path.suffix == ".gguf":
        codec = TextCodec.load(str(path.parent), path.name)
    elif path.exists() or is_hub_id(tokenizer):
        codec = TextCodec.load(tokenizer, revision=revision)
    else:
        raise CheckpointError(
            f"tokenizer {tokenizer!r} not found: no such path, and not of the form of a hub id "
            "(owner/name)"
        )
    if codec is None:
        raise CheckpointError(
            f"tokenizer {tokenizer!r} holds no tokenizer: give the folder of a tokenizer.json or a "
            ".gguf file, or leave it out"
        )


def _gpus_here() -> int:
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False
    )
    return int(counted.stdout) if counted.stdout.strip().isdigit() else 0
