"""Who may connect (TLS, client certificates) and who may call (bearer tokens), for every API."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import ServerConfig
from deploy.edge.errors import Forbidden, Unauthenticated
from deploy.edge.files import CHECK_SECONDS, Reloaded
from deploy.edge.tls import Certificates
from deploy.edge.tokens import Tokens, read_tokens


class Access:
    """What `ServerConfig` says about callers, its files read again when they change.

    `certificates` is None for plain text. The constructor raises `StartupError` naming the file at
    fault.
    """

    def __init__(self, config: ServerConfig, *, check_every_s: float = CHECK_SECONDS) -> None:
        self.certificates: Certificates | None = None
        if config.tls_certificate is not None:
            self.certificates = Certificates(config, check_every_s=check_every_s)
        self._tokens: Reloaded[Tokens] | None = None
        if (path := config.token_file) is not None:
            self._tokens = Reloaded([path], lambda: read_tokens(path), check_every_s=check_every_s)
        self._asks_clients = config.tls_client_ca is not None
        self._allowed = None if config.tls_client_names is None else {*config.tls_client_names}

    def caller(self, authorization: str | None, certificate: Sequence[str] = ()) -> str:
        """The caller's name: its token's, else its certificate's first, else empty.

        `authorization` is the header's value, `certificate` what `tls.names_in` found. Raises
        `Unauthenticated` without a known token, `Forbidden` for a certificate that may not call.
        """
        if self._allowed is not None and self._allowed.isdisjoint(certificate):
            raise Forbidden(
                "none of the names in the client's certificate is among the server's "
                "tls_client_names"
            )
        if self._tokens is not None:
            name = self._tokens.current.name_of(authorization)
            if name is None:
                raise Unauthenticated(
                    "no known bearer token: send `authorization: Bearer TOKEN` (an HTTP header, or "
                    "gRPC metadata) with a token of the server's token_file"
                )
            return name
        return certificate[0] if self._asks_clients and certificate else ""
