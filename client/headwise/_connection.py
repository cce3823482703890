"""Where the server is and how to speak to it: everything checked before anything is sent."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from headwise._retry import Attempts, Deadline, check_timeout
from headwise._target import Address, Target, target_of
from headwise._version import __version__
from headwise.options import RetryPolicy, TLSOptions

Options: TypeAlias = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Connection:
    """What both clients need to open their channels and make calls.

    `control_options` are for the Control service, None where it shares the channel: it is to answer
    also where a server computes nothing, which keeps a channel that checks health from using it.
    `metadata` goes with every call. `timeout` is the default of a call, in seconds.
    """

    target: str
    credentials: grpc.ChannelCredentials | None
    options: Options
    control_options: Options | None
    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    retries: RetryPolicy

    def attempts(self, timeout: float | None, retries: RetryPolicy | None = None) -> Attempts:
        """The attempts at a call that begins now; None stands for this connection's default."""
        timeout = self.timeout if timeout is None else timeout
        return Attempts(retries or self.retries, Deadline(timeout))


def connection(
    address: Address,
    *,
    token: str | None,
    tls: TLSOptions | None,
    timeout: float | None,
    retries: RetryPolicy | int,
) -> Connection:
    """Raises TypeError and ValueError naming the argument; reads the PEM files of `tls`."""
    check_timeout(timeout)
    if isinstance(retries, int):
        if retries < 0:
            raise ValueError(f"retries must not be negative, not {retries}")
        retries = RetryPolicy(attempts=retries + 1)
    target = target_of(address)
    if target.listed and tls is not None and tls.server_name is None:
        raise ValueError(
            "tls.server_name is not set: several addresses need the name that is in their "
            "servers' certificates"
        )
    options = _channel_options(target, tls)
    return Connection(
        target=target.name,
        credentials=None if tls is None else _credentials(tls),
        options=(*options, *_balancing(checks_health=True)) if target.several else options,
        control_options=(*options, *_balancing(checks_health=False)) if target.several else None,
        metadata=_metadata(token),
        timeout=timeout,
        retries=retries,
    )


def _balancing(*, checks_health: bool) -> Options:
    """Calls go round the servers that are there, and that compute if their health is checked."""
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if checks_health:
        config["healthCheckConfig"] = {"serviceName": "headwise.v1.Inference"}
    return (("grpc.service_config", json.dumps(config)),)


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    if token is None:
        return ()
    if not isinstance(token, str):
        raise TypeError(f"token must be str, not {type(token).__name__}")
    # A header carries visible ASCII only. The token itself stays out of the message.
    if re.fullmatch(r"[!-~]+", token) is None:
        raise ValueError("token must be visible ASCII characters without spaces or line ends")
    return (("authorization", f"Bearer {token}"),)


def _channel_options(target: Target, tls: TLSOptions | None) -> Options:
    options: list[tuple[str, int | str]] = [
        ("grpc.primary_user_agent", f"headwise-python/{__version__}"),
        # Logprobs of a long prompt are larger than the default of 4 MB; the server sets the limit.
        ("grpc.max_receive_message_length", -1),
        # One retry policy, ours: it knows the deadline, RetryInfo and what has arrived.
        ("grpc.enable_retries", 0),
        # A server that comes back is found within our own backoff, not gRPC's minute.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A host that vanished without a word breaks its streams, so that they can be resumed. Our
        # server takes a ping every 10 s; one in between that does not slows gRPC down by itself.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A stream that waits in the queue is silent, and pinged all the same.
        ("grpc.http2.max_pings_without_data", 0),
        # Otherwise clients of the same address share a connection and its backoff.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if target.loopback:
        # gRPC obeys http_proxy, and a proxy does not know this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return tuple(options)


def _credentials(tls: TLSOptions) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_pem("root_certificates", tls.root_certificates),
        private_key=_pem("private_key", tls.private_key),
        certificate_chain=_pem("certificate_chain", tls.certificate_chain),
    )


def _pem(field: str, source: str | Path | bytes | None) -> bytes | None:
    if source is None:
        return None
    if isinstance(source, bytes):
        content, where = source, "the bytes given"
    else:
        where = str(source)
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise ValueError(f"tls.{field}: cannot read {source}: {error.strerror}") from error
    # gRPC reports a bad PEM only as a connection that fails, without saying why.
    if b"-----BEGIN " not in content:
        raise ValueError(f"tls.{field}: {where} is not PEM (no -----BEGIN line)")
    return content
