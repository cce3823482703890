"""Tokens and TLS."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise import TLSOptions, UnavailableError
from tests.unit.client_server import CLIENTS, ScriptedServer, finish, says

x509 = pytest.importorskip("cryptography.x509", reason="certificates are made by cryptography")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402


@dataclass(frozen=True)
class Identity:
    """A self-signed certificate and its key, PEM."""

    certificate: bytes
    key: bytes


def identity(name: str, address: str | None = None) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names: list[Any] = [x509.DNSName(name)]
    if address is not None:
        names.append(x509.IPAddress(ipaddress.ip_address(address)))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


@pytest.fixture(scope="module")
def server_identity() -> Identity:
    return identity("headwise.test", "127.0.0.1")


@pytest.fixture(scope="module")
def client_identity() -> Identity:
    return identity("caller.test")


@pytest.fixture
def server(server_identity: Identity) -> Iterator[ScriptedServer]:
    pair = (server_identity.key, server_identity.certificate)
    with ScriptedServer(grpc.ssl_server_credentials([pair])) as server:
        yield server


@pytest.mark.parametrize("kind", CLIENTS)
def test_the_token_is_sent(kind: type[Any]) -> None:
    with ScriptedServer() as server:
        server.script(says(finish()), says(finish()))
        for token in ("s3cret", None):
            with kind(server.address, token=token) as client:
                client.generate("hello")
        with_token, without = (call.metadata for call in server.calls)
        assert with_token["authorization"] == "Bearer s3cret"
        assert "authorization" not in without
        assert str(with_token["user-agent"]).startswith("headwise-python/")


@pytest.mark.parametrize("kind", CLIENTS)
def test_tls_with_a_certificate_from_a_file(
    kind: type[Any], server: ScriptedServer, server_identity: Identity, tmp_path: Path
) -> None:
    root = tmp_path / "ca.pem"
    root.write_bytes(server_identity.certificate)
    for path in (root, str(root)):
        server.script(says(finish()))
        tls = TLSOptions(root_certificates=path)
        with kind(server.address, tls=tls, token="s3cret") as client:
            client.generate("hello")
    assert server.calls[0].metadata["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize(("name", "known"), [("headwise.test", True), ("other.test", False)])
def test_the_server_name_is_checked(
    kind: type[Any],
    server: ScriptedServer,
    server_identity: Identity,
    name: str,
    known: bool,
) -> None:
    server.script(says(finish()))
    tls = TLSOptions(root_certificates=server_identity.certificate, server_name=name)
    with kind(server.address, tls=tls, retries=0) as client:
        if known:
            client.generate("hello")
        else:
            with pytest.raises(UnavailableError):
                client.generate("hello")


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_certificate_that_is_not_trusted_is_refused(
    kind: type[Any], server: ScriptedServer, client_identity: Identity
) -> None:
    tls = TLSOptions(root_certificates=client_identity.certificate)
    with kind(server.address, tls=tls, retries=0) as client, pytest.raises(UnavailableError):
        client.generate("hello")
    assert server.calls == []


@pytest.mark.parametrize("kind", CLIENTS)
def test_mutual_tls(kind: type[Any], server_identity: Identity, client_identity: Identity) -> None:
    credentials = grpc.ssl_server_credentials(
        [(server_identity.key, server_identity.certificate)],
        root_certificates=client_identity.certificate,
        require_client_auth=True,
    )
    known = TLSOptions(
        root_certificates=server_identity.certificate,
        certificate_chain=client_identity.certificate,
        private_key=client_identity.key,
    )
    unknown = TLSOptions(root_certificates=server_identity.certificate)
    with ScriptedServer(credentials) as server:
        server.script(says(finish()))
        with kind(server.address, tls=known) as client:
            client.generate("hello")
        with (
            kind(server.address, tls=unknown, retries=0) as client,
            pytest.raises(UnavailableError),
        ):
            client.generate("hello")
        assert len(server.calls) == 1
