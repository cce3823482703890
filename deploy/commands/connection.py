"""How the client commands reach a server: shared options, and the SDK's errors as one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise import Client, TLSOptions

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="HEADWISE_ADDRESS", help="host:port of the server.")
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the bearer token to send.")
]
TlsCa = Annotated[
    Path | None, typer.Option(help="Use TLS, and trust the certificates in this PEM file.")
]
TlsCertificate = Annotated[
    Path | None, typer.Option(help="This client's certificate (PEM), for mutual TLS.")
]
TlsKey = Annotated[Path | None, typer.Option(help="Its key (PEM).")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a call may take.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_ADDRESS = "127.0.0.1:50051"


class CallFailed(HeadwiseError):
    """A call to a server that did not succeed, or could not be made."""


@contextlib.contextmanager
def connect(
    address: str,
    token_file: Path | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    timeout: float | None,
) -> Iterator[Client]:
    """An SDK client; raises `CallFailed` for whatever the SDK raises."""
    import headwise

    with errors_of(address):
        token, tls = credentials(token_file, tls_ca, tls_certificate, tls_key)
        with headwise.Client(address, token=token, tls=tls, timeout=timeout) as client:
            yield client


@contextlib.contextmanager
def errors_of(address: str) -> Iterator[None]:
    """Turns what the SDK raises in its body into `CallFailed`."""
    import headwise

    try:
        yield
    except headwise.HeadwiseError as error:
        raise CallFailed(f"{address}: {error}") from error
    except (ValueError, OSError) as error:
        raise CallFailed(str(error)) from error


def credentials(
    token_file: Path | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> tuple[str | None, TLSOptions | None]:
    """The token and the TLS options of an SDK client; raises `CallFailed`, OSError, ValueError."""
    import headwise

    tls = (
        headwise.TLSOptions(
            root_certificates=tls_ca, certificate_chain=tls_certificate, private_key=tls_key
        )
        if tls_ca is not None or tls_certificate is not None
        else None
    )
    if token_file is None:
        return None, tls
    words = token_file.read_text().split()
    if not words:
        raise CallFailed(f"--token-file {token_file} holds no token")
    return words[0], tls
