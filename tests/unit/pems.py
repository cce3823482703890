"""Certificates for tests: authorities, and what they sign."""

from __future__ import annotations

import datetime
import ipaddress
import itertools
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_numbers = itertools.count()


@dataclass(frozen=True)
class Pem:
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """Key and certificate, in gRPC's order."""
        return self.key.read_bytes(), self.certificate.read_bytes()


class Authority:
    """Signs certificates for localhost; `certificate` is its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._write(name, self._key, is_authority=True, days=1).certificate

    def issue(self, name: str, *, days: float = 1) -> Pem:
        """A new key's certificate, which expires after `days`."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, key, is_authority=False, days=days)

    def _write(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool, days: float
    ) -> Pem:
        now = datetime.datetime.now(datetime.UTC)
        constraints = x509.BasicConstraints(ca=is_authority, path_length=None)
        localhost = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(constraints, critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName("localhost"), localhost]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        stem = f"{name}-{next(_numbers)}"
        pem = Pem(self._folder / f"{stem}.crt", self._folder / f"{stem}.key")
        pem.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pem


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
