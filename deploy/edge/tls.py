"""The server's certificate and the authority of its clients', read again when they are renewed."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge.files import CHECK_SECONDS, Reloaded, read_file


@dataclass(frozen=True, slots=True)
class _Material:
    """PEM, and what both servers make of it; `not_after` is unix time."""

    key: bytes
    chain: bytes
    authority: bytes | None
    context: ssl.SSLContext
    not_after: float


class Certificates:
    """TLS 1.2 and later, as configured. Connections take the newest certificate at their handshake
    and keep it; a renewal that cannot be used is logged, and the old certificate stays.

    The constructor raises `StartupError` naming the file at fault.
    """

    def __init__(self, config: ServerConfig, *, check_every_s: float = CHECK_SECONDS) -> None:
        files = (config.tls_certificate, config.tls_key, config.tls_client_ca)
        self._material = Reloaded(
            [path for path in files if path is not None],
            lambda: _read(config),
            check_every_s=check_every_s,
        )

    @property
    def not_after(self) -> float:
        """Unix time at which the certificate now in use expires."""
        return self._material.current.not_after

    def for_grpc(self) -> grpc.ServerCredentials:
        """Credentials that ask for the certificate at every handshake."""
        given = self._material.current

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            material = self._material.current
            if material is given:
                return None
            given = material
            return _as_grpc(material)

        return grpc.dynamic_ssl_server_credentials(
            _as_grpc(given),
            renewed,  # type: ignore[arg-type] # None leaves what there is
            require_client_authentication=given.authority is not None,
        )

    def for_http(self) -> ssl.SSLContext:
        """A context whose connections each take the newest one."""
        context = _context(self._material.current.authority is not None)

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._material.current.context

        # Called in every handshake, whether the client names a host or not.
        context.sni_callback = renew
        return context


def names_in(peer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of a client's certificate: common names, then alternative names (DNS, URI, email);
    none without one.

    `peer` is what gRPC (`context.auth_context()`) or Python (`SSLObject.getpeercert()`) says.
    """
    if not peer:
        return ()
    names: list[str] = []
    for key in ("x509_common_name", "peer_dns", "peer_uri", "peer_email"):
        names += [value.decode(errors="replace") for value in peer.get(key, ())]
    for part in peer.get("subject", ()):
        names += [value for kind, value in part if kind == "commonName"]
    alternative = peer.get("subjectAltName", ())
    for named in ("DNS", "URI", "email"):
        names += [value for kind, value in alternative if kind == named]
    return tuple(dict.fromkeys(names))


def _as_grpc(material: _Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.chain)], material.authority
    )


def _context(asks_clients: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if asks_clients:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(config: ServerConfig) -> _Material:
    assert config.tls_certificate is not None
    assert config.tls_key is not None
    chain = read_file("tls_certificate", config.tls_certificate)
    key = read_file("tls_key", config.tls_key)
    not_after = _check_pair(config, chain, key)
    authority = None
    if config.tls_client_ca is not None:
        authority = read_file("tls_client_ca", config.tls_client_ca)
    context = _context(authority is not None)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=b"")
    except (OSError, ssl.SSLError) as error:
        raise _not_a_pair(config, str(error)) from error
    if authority is not None:
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise StartupError(
                f"tls_client_ca {config.tls_client_ca} holds no certificates in PEM: {error}"
            ) from error
    return _Material(key, chain, authority, context, not_after)


def _check_pair(config: ServerConfig, chain: bytes, key: bytes) -> float:
    """When the certificate expires. gRPC itself would only say that it could not add a port."""
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _not_a_pair(config, str(error)) from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*form) != public.public_bytes(*form):
        raise _not_a_pair(config, "the key is another one's")
    end = certificate.not_valid_after_utc
    if end <= datetime.datetime.now(datetime.UTC):
        raise StartupError(
            f"tls_certificate {config.tls_certificate} expired at {end.isoformat()}: renew it"
        )
    return end.timestamp()


def _not_a_pair(config: ServerConfig, cause: str) -> StartupError:
    return StartupError(
        f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key} are not a "
        f"certificate and its unencrypted key in PEM: {cause}"
    )
