"""Bearer tokens from a file: who they belong to, and nothing more of them in memory than a hash."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

from cluster.errors import StartupError
from deploy.edge.files import read_file

_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9._@/-]{1,64}")
# What a bearer token may consist of: RFC 6750, section 2.1. A colon is not among it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class Tokens:
    """Names by the SHA-256 of their tokens."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._names = tuple(names.items())

    def name_of(self, authorization: str | None) -> str | None:
        """Whose token an Authorization header carries; None for none that is known."""
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        found = None
        # Every token is compared, in constant time, so that timing tells nothing about any of them.
        for known, name in self._names:
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_tokens(path: str) -> Tokens:
    """One per line: `TOKEN`, `sha256:HEX`, `NAME:TOKEN` or `NAME:sha256:HEX`.

    HEX is the SHA-256 of the token. A line without a name is known as token-LINE. Several tokens
    may bear the same name, as during a change of tokens. Blank lines and those that begin with #
    do not count. Raises `StartupError` naming the line, never what is in it.
    """
    try:
        text = read_file("token_file", path).decode("ascii")
    except UnicodeDecodeError as error:
        raise StartupError(f"token_file {path}: tokens are ASCII text") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, digest = _parsed(entry, number, path)
        if names.setdefault(digest, name) != name:
            raise StartupError(
                f"token_file {path}: the token of line {number} is also that of "
                f"{names[digest]!r}: give each caller its own"
            )
    if not names:
        raise StartupError(f"token_file {path} holds no token: write one per line")
    return Tokens(names)


def _parsed(entry: str, number: int, path: str) -> tuple[str, bytes]:
    name, secret = f"token-{number}", entry
    if ":" in entry and not entry.startswith(_HASHED):
        name, _, secret = entry.partition(":")
        if not _NAME.fullmatch(name):
            raise StartupError(
                f"token_file {path}, line {number}: a name is 1 to 64 letters, digits and . _ @ / -"
            )
    if secret.startswith(_HASHED):
        digest = secret.removeprefix(_HASHED)
        if not _DIGEST.fullmatch(digest):
            raise StartupError(
                f"token_file {path}, line {number}: {_HASHED} is followed by the 64 hexadecimal "
                "digits of a token's SHA-256"
            )
        return name, bytes.fromhex(digest)
    if not _TOKEN.fullmatch(secret):
        raise StartupError(
            f"token_file {path}, line {number}: a token consists of letters, digits and . _ ~ + / -"
        )
    return name, _digest(secret)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
