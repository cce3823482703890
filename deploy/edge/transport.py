"""What a gRPC connection may take: options of the transport, and open files."""

from __future__ import annotations

import contextlib
import resource

import structlog

from cluster.config import ServerConfig

log = structlog.get_logger(__name__)

_KEEPALIVE_MS = 30_000
_HANDSHAKE_MS = 10_000
_INT32_MAX = 2**31 - 1
# Besides connections: weights, sockets of ranks, libraries, logs.
_OTHER_FILES = 1024


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Channel arguments: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    return [
        # Also of what a compressed message unpacks to.
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        # Who connects and then says nothing, or slowly.
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        # A client whose machine vanished holds its KV cache until somebody notices.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        # Who pings more often is told ENHANCE_YOUR_CALM.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # So that clients spread over new replicas, and take part in renewed certificates.
        ("grpc.max_connection_age_ms", _milliseconds(config.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(config.max_connection_age_grace_s)),
    ]


def raise_file_limit(config: ServerConfig) -> None:
    """Let this process open a file for every connection, as far as its hard limit goes."""
    needed = config.max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    most = needed if hard == unlimited else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft < needed:
        log.warning(
            "few open files are allowed", limit=soft, max_connections=config.max_connections
        )


def _milliseconds(seconds: float | None) -> int:
    return _INT32_MAX if seconds is None else round(seconds * 1000)
