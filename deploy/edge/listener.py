"""The sockets of a gRPC server in this process: who is connected, and no one anew.

gRPC has no call that ends listening alone. Its `stop` does more: a call that arrives before the
client has heard of it is cancelled. So a server that is to be replaced without a lost call stops
listening first, answers on until its connections have made way (`max_connection_age_s`), and only
then stops.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil


def stop_listening(port: int) -> None:
    """New connections go to whoever else listens on the port, or are refused."""
    for listener in _sockets(port, psutil.CONN_LISTEN):
        with socket.socket(fileno=os.dup(listener.fd)) as duplicate:
            duplicate.shutdown(socket.SHUT_RD)


def connections(port: int) -> int:
    """How many clients are connected."""
    return sum(1 for _ in _sockets(port, psutil.CONN_ESTABLISHED))


def _sockets(port: int, state: str) -> Iterator[Any]:
    for found in psutil.Process().net_connections("tcp"):
        if found.status == state and found.laddr.port == port:
            yield found
