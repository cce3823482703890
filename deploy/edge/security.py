"""Who may connect (TLS, client certificates) and who may call (bearer tokens)."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge import errors

_OPEN = "/grpc.health.v1.Health/"


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS as configured, or None for plain text; `StartupError` names the file at fault."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    certificate = _read("tls_certificate", config.tls_certificate)
    key = _read("tls_key", config.tls_key)
    # grpc would only say that it could not add a port.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=b"")
    except (ssl.SSLError, ValueError) as error:
        raise StartupError(
            f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key} are not a "
            f"certificate and its unencrypted key in PEM: {error}"
        ) from error
    authority = None
    if config.tls_client_ca is not None:
        authority = _read("tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise StartupError(
                f"tls_client_ca {config.tls_client_ca} holds no certificates in PEM: {error}"
            ) from error
    return grpc.ssl_server_credentials(
        [(key, certificate)], authority, require_client_auth=authority is not None
    )


def read_tokens(path: str) -> tuple[str, ...]:
    """One bearer token per line; blank lines do not count."""
    try:
        lines = _read("token_file", path).decode("ascii").split()
    except UnicodeDecodeError as error:
        raise StartupError(f"token_file {path}: tokens are ASCII text: {error}") from error
    if not lines:
        raise StartupError(f"token_file {path} holds no token: write one per line")
    return tuple(lines)


class BearerTokens(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, before their message is read. Health stays open."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._digests = tuple(_digest(token) for token in tokens)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        if handler_call_details.method.startswith(_OPEN) or self._known(
            dict(handler_call_details.invocation_metadata or ()).get("authorization")
        ):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _known(self, authorization: str | bytes | None) -> bool:
        if not isinstance(authorization, str):
            return False
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        # Every token is compared, in constant time, so that timing tells nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


async def _refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await errors.abort(
        context,
        errors.Unauthenticated(
            "no known bearer token: send metadata `authorization: Bearer TOKEN` with a token of "
            "the server's token_file"
        ),
        request_id="",
    )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"{field} {path} cannot be read: {error.strerror}") from error
