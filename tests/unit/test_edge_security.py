"""Who may connect and who may call: TLS, client certificates, bearer tokens, and their renewal."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge.errors import Forbidden, Unauthenticated
from deploy.edge.security import Access
from deploy.edge.tls import Certificates, names_in
from deploy.edge.tokens import read_tokens
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.pems import Authority, Pem

ONE = pb.Stopping(max_tokens=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="module")
def pems(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pem]:
    """A server's and a client's certificate; another authority has signed the stranger's."""
    other = Authority(tmp_path_factory.mktemp("other"), "other")
    return {
        "server": authority.issue("server"),
        "client": authority.issue("client"),
        "stranger": other.issue("stranger"),
    }


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


async def test_health_is_open_and_nothing_else_is(tokens: Path) -> None:
    async with running_edge(token_file=str(tokens)) as edge:
        health = health_pb2_grpc.HealthStub(edge.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        reflection = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as reflecting:
            await reflection.ServerReflectionInfo(iter([request])).read()
        known = reflection.ServerReflectionInfo(
            iter([request]), metadata=(("authorization", "Bearer first-token"),)
        )
        assert (await known.read()).list_services_response.service
        with pytest.raises(grpc.aio.AioRpcError) as guessing:
            await edge.channel.unary_unary("/headwise.v1.Inference/Guess")(b"")

    assert reflecting.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert guessing.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_stranger_is_refused_before_its_message_comes(tokens: Path) -> None:
    async with running_edge(token_file=str(tokens)) as edge:
        call = edge.channel.stream_stream("/headwise.v1.Inference/Generate")()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_callers_are_named_in_the_log_and_tokens_are_not(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("alice:hunter2\n")
    with capture_logs(processors=[merge_contextvars]) as entries:
        async with running_edge(token_file=str(path)) as edge:
            assert await code_with(edge, "Bearer hunter2") is grpc.StatusCode.OK
            await code_with(edge, "Bearer hunter3")

    assert [entry.get("caller") for entry in entries if entry["event"] == "call"] == ["alice", None]
    assert "hunter" not in str(entries)


def test_the_forms_of_a_token_line(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret-3").hexdigest()
    path = tmp_path / "tokens"
    path.write_text(
        "# comment\nsecret-1\nalice:secret-2\n"
        f"bob:sha256:{digest}\nbob:secret-4\nsha256:{'0' * 64}\n"
    )
    tokens = read_tokens(str(path))

    names = [tokens.name_of(f"Bearer secret-{number}") for number in range(1, 6)]
    assert names == ["token-2", "alice", "bob", "bob", None]
    assert tokens.name_of(f"Bearer {digest}") is None
    assert tokens.name_of(f"Bearer sha256:{digest}") is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (" \n# none\n", "holds no token"),
        ("good\nsp ace\n", "line 2"),
        ("na me:secret", "line 1"),
        ("sha256:abc", "64 hexadecimal"),
        ("a:same\nb:same", "also that of 'a'"),
        ("t\u00f6ken", "ASCII"),
    ],
)
def test_bad_token_files_are_refused_without_quoting_them(
    tmp_path: Path, content: str, fault: str
) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(StartupError, match=fault) as caught:
        read_tokens(str(path))
    assert "same" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        read_tokens(str(tmp_path / "missing"))


def test_tokens_are_read_again_as_kubernetes_swaps_them(tmp_path: Path) -> None:
    for version, content in (("v1", "alice:one"), ("v2", "alice:two"), ("v3", "bro ken")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tokens").write_text(content)
    mounted = tmp_path / "data"
    mounted.symlink_to("v1")
    access = Access(ServerConfig(token_file=str(mounted / "tokens")), check_every_s=0)

    def swap(version: str) -> None:
        (tmp_path / "next").symlink_to(version)
        (tmp_path / "next").rename(mounted)

    assert access.caller("Bearer one") == "alice"
    swap("v2")
    assert access.caller("Bearer two") == "alice"
    with pytest.raises(Unauthenticated):
        access.caller("Bearer one")
    with capture_logs() as entries:
        swap("v3")
        assert access.caller("Bearer two") == "alice"
        assert access.caller("Bearer two") == "alice"
    (error,) = entries
    assert error["log_level"] == "error"
    assert "line 1" in error["cause"]


async def test_tls(authority: Authority, pems: dict[str, Pem]) -> None:
    server = pems["server"]
    trusting = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
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
    ("client", "names", "code"),
    [
        ("client", None, grpc.StatusCode.OK),
        ("client", "someone,client", grpc.StatusCode.OK),
        ("client", "localhost", grpc.StatusCode.OK),
        ("client", "someone", grpc.StatusCode.PERMISSION_DENIED),
        ("stranger", None, grpc.StatusCode.UNAVAILABLE),
        (None, None, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_mutual_tls(
    authority: Authority,
    pems: dict[str, Pem],
    client: str | None,
    names: str | None,
    code: grpc.StatusCode,
) -> None:
    root = authority.certificate
    key, certificate = (None, None) if client is None else pems[client].read()
    with capture_logs(processors=[merge_contextvars]) as entries:
        async with running_edge(
            credentials=grpc.ssl_channel_credentials(root.read_bytes(), key, certificate),
            tls_certificate=str(pems["server"].certificate),
            tls_key=str(pems["server"].key),
            tls_client_ca=str(root),
            tls_client_names=names,
        ) as edge:
            assert await code_with(edge, None) is code

    callers = {entry.get("caller") for entry in entries if entry["event"] == "call"}
    assert ("client" in callers) == (code is grpc.StatusCode.OK)


def test_a_certificate_names_its_caller_unless_a_token_does(
    authority: Authority, pems: dict[str, Pem], tokens: Path
) -> None:
    server = pems["server"]
    config = {
        "tls_certificate": str(server.certificate),
        "tls_key": str(server.key),
        "tls_client_ca": str(authority.certificate),
    }
    assert Access(ServerConfig(**config)).caller(None, ("client", "localhost")) == "client"
    both = Access(ServerConfig(**config, token_file=str(tokens)))
    assert both.caller("Bearer first-token", ("client",)) == "token-1"
    with pytest.raises(Unauthenticated):
        both.caller(None, ("client",))
    with pytest.raises(Forbidden):
        Access(ServerConfig(**config, tls_client_names=("a",))).caller(None, ("client",))


def test_names_of_a_certificate() -> None:
    """Of alternative names, those that are text: a directory name is not, an address is no name."""
    found = {
        "subject": ((("countryName", "XX"),), (("commonName", "client"),)),
        "subjectAltName": (
            ("DirName", ((("commonName", "admin"),),)),
            ("IP Address", "10.0.0.1"),
            ("email", "a@b"),
            ("DNS", "client.local"),
            ("URI", "spiffe://a/b"),
        ),
    }
    names = ("client", "client.local", "spiffe://a/b", "a@b")
    assert names_in(found) == names
    by_grpc = {
        "x509_common_name": [b"client"],
        "x509_subject_alternative_name": [b"10.0.0.1", b"client.local", b"spiffe://a/b", b"a@b"],
        "peer_dns": [b"client.local"],
        "peer_uri": [b"spiffe://a/b"],
        "peer_email": [b"a@b"],
        "peer_ip": [b"10.0.0.1"],
    }
    assert names_in(by_grpc) == names


def test_names_need_an_authority() -> None:
    with pytest.raises(ValidationError, match="tls_client_names needs tls_client_ca"):
        ServerConfig(tls_client_names=("a",))


class Mounted:
    """Certificate, key and client CA behind names that stay, as in a secret's mount."""

    def __init__(self, folder: Path, server: Pem, authority: Authority) -> None:
        self._folder = folder
        self._put("server.crt", server.certificate)
        self._put("server.key", server.key)
        self._put("ca.crt", authority.certificate)
        self.config = ServerConfig(
            tls_certificate=str(folder / "server.crt"),
            tls_key=str(folder / "server.key"),
            tls_client_ca=str(folder / "ca.crt"),
        )

    def renew(self, server: Pem | None = None, authority: Authority | None = None) -> None:
        if server is not None:
            self._put("server.crt", server.certificate)
            self._put("server.key", server.key)
        if authority is not None:
            self._put("ca.crt", authority.certificate)

    def spoil(self) -> None:
        (self._folder / "server.crt").write_text("half of a certif")

    def _put(self, name: str, source: Path) -> None:
        new = self._folder / f"{name}.new"
        new.write_bytes(source.read_bytes())
        new.rename(self._folder / name)


def certificate_of(pem: Pem) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.certificate.read_bytes())


@contextlib.asynccontextmanager
async def echo_server(credentials: grpc.ServerCredentials) -> AsyncIterator[int]:
    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    handler = grpc.unary_unary_rpc_method_handler(echo)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"m": handler}),))
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    yield port
    await server.stop(0)


async def shown_certificate(port: int, authority: Authority, client: Pem) -> x509.Certificate:
    """What a new connection is shown; raises where it is refused."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(client.certificate, client.key)
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        tls = writer.get_extra_info("ssl_object")
        # With TLS 1.3, a server's refusal comes after the handshake; SETTINGS come otherwise.
        if not await reader.read(1):
            raise ConnectionResetError
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True))
    finally:
        writer.close()


async def test_a_renewed_certificate_is_shown_and_connections_stay(
    authority: Authority, pems: dict[str, Pem], tmp_path: Path
) -> None:
    mounted = Mounted(tmp_path, pems["server"], authority)
    certificates = Certificates(mounted.config, check_every_s=0)
    renewed = authority.issue("server", days=3)
    key, chain = pems["client"].read()
    trusting = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), key, chain)
    async with (
        echo_server(certificates.for_grpc()) as port,
        grpc.aio.secure_channel(f"localhost:{port}", trusting) as channel,
    ):
        call = channel.unary_unary("/s/m")
        assert await call(b"before") == b"before"
        shown = await shown_certificate(port, authority, pems["client"])
        assert shown == certificate_of(pems["server"])

        mounted.renew(renewed)
        shown = await shown_certificate(port, authority, pems["client"])
        assert shown == certificate_of(renewed)
        assert await call(b"after") == b"after"
        assert certificates.not_after == certificate_of(renewed).not_valid_after_utc.timestamp()

        with capture_logs() as entries:
            mounted.spoil()
            for _ in range(2):
                shown = await shown_certificate(port, authority, pems["client"])
                assert shown == certificate_of(renewed)
        assert [entry["log_level"] for entry in entries] == ["error"]


async def test_http_takes_renewed_certificates_and_authorities(
    authority: Authority, pems: dict[str, Pem], tmp_path: Path
) -> None:
    mounted = Mounted(tmp_path, pems["server"], authority)
    certificates = Certificates(mounted.config, check_every_s=0)

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hi")
        writer.close()

    async with await asyncio.start_server(
        greet, "localhost", 0, ssl=certificates.for_http()
    ) as server:
        port = server.sockets[0].getsockname()[1]
        shown = await shown_certificate(port, authority, pems["client"])
        assert shown == certificate_of(pems["server"])

        renewed, others = authority.issue("server"), Authority(tmp_path, "others")
        mounted.renew(renewed, others)
        shown = await shown_certificate(port, authority, others.issue("client"))
        assert shown == certificate_of(renewed)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await shown_certificate(port, authority, pems["client"])


async def test_grpc_takes_renewed_authorities(
    authority: Authority, pems: dict[str, Pem], tmp_path: Path
) -> None:
    mounted = Mounted(tmp_path, pems["server"], authority)
    others = Authority(tmp_path, "others")
    async with echo_server(Certificates(mounted.config, check_every_s=0).for_grpc()) as port:
        assert await shown_certificate(port, authority, pems["client"])
        mounted.renew(authority=others)
        assert await shown_certificate(port, authority, others.issue("client"))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await shown_certificate(port, authority, pems["client"])


def test_credentials_that_cannot_work_are_refused_by_file(
    authority: Authority, pems: dict[str, Pem], tmp_path: Path
) -> None:
    server, other = pems["server"], pems["client"]
    expired = authority.issue("server", days=-1)
    junk = tmp_path / "junk.pem"
    junk.write_text("not PEM")
    for name, config in _bad_configs(server, other, expired, junk):
        with pytest.raises(StartupError, match=name):
            Access(ServerConfig(**config))


def _bad_configs(
    server: Pem, other: Pem, expired: Pem, junk: Path
) -> Iterator[tuple[str, dict[str, str]]]:
    good = {"tls_certificate": str(server.certificate), "tls_key": str(server.key)}
    yield "missing.crt", {**good, "tls_certificate": "missing.crt"}
    yield "missing.key", {**good, "tls_key": "missing.key"}
    yield other.key.name, {**good, "tls_key": str(other.key)}
    yield junk.name, {**good, "tls_certificate": str(junk)}
    yield junk.name, {**good, "tls_client_ca": str(junk)}
    yield (
        f"{expired.certificate.name} expired",
        {"tls_certificate": str(expired.certificate), "tls_key": str(expired.key)},
    )


async def test_a_port_in_use_is_one_sentence() -> None:
    async with running_edge() as edge:
        port = int(edge.edge.address.rpartition(":")[2])
        with pytest.raises(StartupError, match=f"127.0.0.1:{port} cannot be listened on"):
            async with running_edge(grpc_port=port):
                pass
