"""What can be known to fail before anything is started; Ray alone takes five seconds to start."""

from __future__ import annotations

import socket

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig, ServerConfig
from deploy.edge.security import read_tokens, server_credentials
from deploy.edge.server import port_taken


def check(cluster: ClusterConfig, server: ServerConfig) -> None:
    """Raises `HeadwiseError` with the one sentence the user needs. Reads no weights."""
    _check_port(server)
    server_credentials(server)
    if server.token_file is not None:
        read_tokens(server.token_file)
    draw_up(cluster)


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
