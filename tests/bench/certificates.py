"""Certificates of the peers' hops, as long a chain as ours: root, one intermediate for each host, P-256 leaves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.bench.peers.hop import Tls

VALID = timedelta(days=1)
SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def peer_name(host: str) -> str:
    return f"{host}.bench"


def issue(directory: Path, hosts: tuple[str, ...]) -> dict[str, Tls]:
    """One leaf for each host, named `peer_name(host)`."""
    directory.mkdir(parents=True, exist_ok=True)
    root = _authority("root", None)
    file = directory / "root.pem"
    file.write_bytes(_pem(root.certificate))
    return {host: _leaf(directory, file, host, _authority(f"host {host}", root)) for host in hosts}


def _leaf(directory: Path, root: Path, host: str, issuer: _Authority) -> Tls:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(peer_name(host), key, issuer.certificate.subject)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(peer_name(host))]), critical=False)
    builder = builder.add_extension(usage, critical=False)
    certificate = builder.sign(issuer.key, hashes.SHA256())
    tls = Tls(root, *(directory / f"{host}-{part}.pem" for part in ("chain", "key", "both")))
    chain, secret = _pem(certificate) + _pem(issuer.certificate), _key_pem(key)
    for path, content in ((tls.chain, chain), (tls.key, secret), (tls.both, chain + secret)):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return tls


def _authority(name: str, issuer: _Authority | None) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, key, issuer.certificate.subject if issuer else None)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return _Authority(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def _builder(name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None) -> x509.CertificateBuilder:
    """No issuer: it signs itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + VALID)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    private = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
