"""Where the server is and how to speak to it: everything checked before anything is sent."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from headwise._retry import Attempts, Deadline, check_timeout
from headwise._version import __version__
from headwise.options import RetryPolicy, TLSOptions

# Schemes that gRPC resolves itself, besides host:port.
_RESOLVED = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Connection:
    """What both clients need to open a channel and make calls.

    `metadata` goes with every call. `timeout` is the default of a call, in seconds.
    """

    address: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, int | str], ...]
    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    retries: RetryPolicy

    def attempts(self, timeout: float | None, retries: RetryPolicy | None = None) -> Attempts:
        """The attempts at a call that begins now; None stands for this connection's default."""
        timeout = self.timeout if timeout is None else timeout
        return Attempts(retries or self.retries, Deadline(timeout))


def connection(
    address: str,
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
    host = _check_address(address)
    return Connection(
        address=address,
        credentials=None if tls is None else _credentials(tls),
        options=_channel_options(host, tls),
        metadata=_metadata(token),
        timeout=timeout,
        retries=retries,
    )


def _check_address(address: str) -> str | None:
    """The host, None where gRPC resolves the address by its scheme."""
    if not isinstance(address, str):
        raise TypeError(f"address must be str, not {type(address).__name__}")
    if address.startswith(_RESOLVED):
        return None
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"address must be host:port, such as 127.0.0.1:50051, not {address!r}")
    return match["host"].strip("[]")


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    if token is None:
        return ()
    if not isinstance(token, str):
        raise TypeError(f"token must be str, not {type(token).__name__}")
    # A header carries visible ASCII only. The token itself stays out of the message.
    if re.fullmatch(r"[!-~]+", token) is None:
        raise ValueError("token must be visible ASCII characters without spaces or line ends")
    return (("authorization", f"Bearer {token}"),)


def _channel_options(host: str | None, tls: TLSOptions | None) -> tuple[tuple[str, int | str], ...]:
    options: list[tuple[str, int | str]] = [
        ("grpc.primary_user_agent", f"headwise-python/{__version__}"),
        # Logprobs of a long prompt are larger than the default of 4 MB; the server sets the limit.
        ("grpc.max_receive_message_length", -1),
        # One retry policy, ours: it knows the deadline and RetryInfo.
        ("grpc.enable_retries", 0),
        # A server that comes back is found within our own backoff, not gRPC's minute.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A host that vanished without a word ends its streams. Servers refuse pings more frequent
        # than one in 5 minutes unless they are told otherwise.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Otherwise clients of the same address share a connection and its backoff.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if host is not None and _is_loopback(host):
        # gRPC obeys http_proxy, and a proxy does not know this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return tuple(options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
