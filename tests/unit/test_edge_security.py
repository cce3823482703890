"""Bearer tokens, TLS, mutual TLS, and what a wrong configuration says at the start."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge.security import read_tokens, server_credentials
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import RunningEdge, running_edge

ONE = pb.Stopping(max_tokens=1)


@dataclass(frozen=True)
class Pem:
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        return self.key.read_bytes(), self.certificate.read_bytes()


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pem]:
    """An authority, and a server's and a client's certificate signed by it; "stranger" is not."""
    folder = tmp_path_factory.mktemp("pem")
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in _NAMES}
    found = {}
    for name, key in keys.items():
        issuer = "stranger" if name == "stranger" else "authority"
        found[name] = _write(folder, name, key, issuer, keys[issuer])
    return found


_NAMES = ("authority", "server", "client", "stranger")


def _write(folder: Path, name: str, key: Any, issuer: str, issuer_key: Any) -> Pem:
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA256())
    )
    pem = Pem(folder / f"{name}.crt", folder / f"{name}.key")
    pem.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("first-token\n\n  second-token\n")
    return path


async def code_with(edge: RunningEdge, authorization: str | None) -> grpc.StatusCode:
    metadata = () if authorization is None else (("authorization", authorization),)
    call = edge.inference.Generate(pb.GenerateRequest(text="x", stopping=ONE), metadata=metadata)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        ("Bearer first-token", grpc.StatusCode.OK),
        ("bearer second-token", grpc.StatusCode.OK),
        (None, grpc.StatusCode.UNAUTHENTICATED),
        ("Bearer", grpc.StatusCode.UNAUTHENTICATED),
        ("Bearer first-toke", grpc.StatusCode.UNAUTHENTICATED),
        ("Bearer first-token2", grpc.StatusCode.UNAUTHENTICATED),
        ("Basic first-token", grpc.StatusCode.UNAUTHENTICATED),
        ("first-token", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
async def test_calls_need_a_known_token(
    tokens: Path, authorization: str | None, code: grpc.StatusCode
) -> None:
    async with running_edge(token_file=str(tokens)) as edge:
        assert await code_with(edge, authorization) is code
        assert bool(edge.generator.requests) == (code is grpc.StatusCode.OK)


async def test_health_is_open_and_reflection_is_not(tokens: Path) -> None:
    async with running_edge(token_file=str(tokens)) as edge:
        health = health_pb2_grpc.HealthStub(edge.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        reflection = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(iter([request])).read()
        known = reflection.ServerReflectionInfo(
            iter([request]), metadata=(("authorization", "Bearer first-token"),)
        )
        assert (await known.read()).list_services_response.service

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_tls(pems: dict[str, Pem]) -> None:
    server = pems["server"]
    trusting = grpc.ssl_channel_credentials(pems["authority"].certificate.read_bytes())
    async with running_edge(
        credentials=trusting,
        tls_certificate=str(server.certificate),
        tls_key=str(server.key),
    ) as edge:
        assert await code_with(edge, None) is grpc.StatusCode.OK
        async with grpc.aio.insecure_channel(edge.edge.address) as plain:
            call = plain.unary_unary("/headwise.v1.Inference/Tokenize")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", timeout=10)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("client", "code"),
    [
        ("client", grpc.StatusCode.OK),
        ("stranger", grpc.StatusCode.UNAVAILABLE),
        (None, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_mutual_tls(pems: dict[str, Pem], client: str | None, code: grpc.StatusCode) -> None:
    root = pems["authority"].certificate
    key, certificate = (None, None) if client is None else pems[client].read()
    async with running_edge(
        credentials=grpc.ssl_channel_credentials(root.read_bytes(), key, certificate),
        tls_certificate=str(pems["server"].certificate),
        tls_key=str(pems["server"].key),
        tls_client_ca=str(root),
    ) as edge:
        assert await code_with(edge, None) is code


def test_credentials_that_cannot_work_are_refused_by_file(
    pems: dict[str, Pem], tmp_path: Path
) -> None:
    server, other = pems["server"], pems["client"]
    junk = tmp_path / "junk.pem"
    junk.write_text("not PEM")
    for name, config in _bad_configs(server, other, junk):
        with pytest.raises(StartupError, match=name):
            server_credentials(ServerConfig(**config))


def _bad_configs(server: Pem, other: Pem, junk: Path) -> Iterator[tuple[str, dict[str, str]]]:
    good = {"tls_certificate": str(server.certificate), "tls_key": str(server.key)}
    yield "missing.crt", {**good, "tls_certificate": "missing.crt"}
    yield "missing.key", {**good, "tls_key": "missing.key"}
    yield other.key.name, {**good, "tls_key": str(other.key)}
    yield junk.name, {**good, "tls_certificate": str(junk)}
    yield junk.name, {**good, "tls_client_ca": str(junk)}


def test_a_token_file_must_hold_a_token(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    with pytest.raises(StartupError, match="holds no token"):
        read_tokens(str(empty))
    with pytest.raises(StartupError, match="cannot be read"):
        read_tokens(str(tmp_path / "missing"))


async def test_a_port_in_use_is_one_sentence() -> None:
    async with running_edge() as edge:
        port = int(edge.edge.address.rpartition(":")[2])
        with pytest.raises(StartupError, match=f"127.0.0.1:{port} cannot be listened on"):
            async with running_edge(grpc_port=port):
                pass
