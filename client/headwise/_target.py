"""Where a channel is opened to: one server or several."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Address: TypeAlias = str | Sequence[str]

# Schemes that gRPC resolves itself, besides host:port.
_RESOLVED = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Target:
    """A name as gRPC takes it.

    `several` servers may be behind it; `listed` are those whose addresses are all in the name.
    `loopback` never leaves this machine.
    """

    name: str
    several: bool
    listed: bool = False
    loopback: bool = False


def target_of(address: Address) -> Target:
    """Raises TypeError and ValueError for what cannot be an address; looks up names of a list."""
    if isinstance(address, str):
        if address.startswith(_RESOLVED):
            return Target(address, several=address.startswith("dns:") or "," in address)
        host, _ = _host_and_port(address)
        loopback = host == "localhost" or _is_loopback(host)
        return Target(address, several=not loopback and not _is_ip(host), loopback=loopback)
    if not isinstance(address, Sequence) or isinstance(address, bytes):
        raise TypeError(f"address must be str or a list of them, not {type(address).__name__}")
    if not address:
        raise ValueError("address is an empty list: give at least one host:port")
    if len(address) == 1:
        return target_of(address[0])
    servers = [_host_and_port(entry) for entry in address]
    # gRPC takes lists of numbers only, and all of one kind.
    for family, scheme, form in (
        (socket.AF_INET, "ipv4", "{}:{}"),
        (socket.AF_INET6, "ipv6", "[{}]:{}"),
    ):
        found = [(_numbers(host, family), port) for host, port in servers]
        if all(numbers for numbers, _ in found):
            names = [form.format(number, port) for numbers, port in found for number in numbers]
            loopback = all(_is_loopback(number) for numbers, _ in found for number in numbers)
            return Target(f"{scheme}:{','.join(names)}", True, listed=True, loopback=loopback)
    raise ValueError(
        f"address: {', '.join(address)} have neither all an IPv4 nor all an IPv6 address: give one "
        "kind"
    )


def _numbers(host: str, family: socket.AddressFamily) -> list[str]:
    """The addresses of a host, none if it has none of that kind."""
    try:
        infos = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(info[4][0]) for info in infos})


def _host_and_port(address: object) -> tuple[str, int]:
    if not isinstance(address, str):
        raise TypeError(f"address must be str, not {type(address).__name__}")
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"address must be host:port, such as 127.0.0.1:50051, not {address!r}")
    return match["host"].strip("[]"), int(match["port"])


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_ip(host) and ipaddress.ip_address(host).is_loopback
