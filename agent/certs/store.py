"""The certificates of a host: `root.pem` (one or more trusted roots), `host.pem`, `host.key`; the mesh adds `root.key`.

Loading is strict on purpose: every check here is one an operator would otherwise meet as a failed handshake on another
host. The caller keeps what it had when this raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.certs.authority import CertError, Issued, date
from agent.certs.files import make_directory, read_certificates, read_key, write_certificate, write_key
from agent.certs.verify import UNREADABLE, alternative_names, is_ca, only_uri


@dataclass(frozen=True, slots=True)
class HostAuthority:
    """What a host needs to issue its own leaves and to verify everybody else's."""

    trust_domain: str
    host: str
    roots_pem: bytes
    intermediate: Issued
    not_after: float  # of the intermediate: `underpass ca host` must have run again by then


def write_root(directory: Path, root: Issued) -> None:
    make_directory(directory)
    write_key(directory / "root.key", root.key_pem)
    write_certificate(directory / "root.pem", root.certificate_pem)


def write_host(directory: Path, roots_pem: bytes, intermediate: Issued) -> None:
    make_directory(directory)
    # The key first: of two writers at once exactly one creates it, and only that one goes on to the certificates.
    write_key(directory / "host.key", intermediate.key_pem)
    write_certificate(directory / "root.pem", roots_pem)
    write_certificate(directory / "host.pem", intermediate.certificate_pem)


def load_host(directory: Path, host: str, trust_domain: str, now: float) -> HostAuthority:
    """Read and check the three files; CertError names the first thing wrong and what to do about it."""
    renew = f"renew it with `underpass ca host {host}`"
    make = f"make it with `underpass ca host {host}`"
    roots_pem, roots = _load_certificates(directory / "root.pem", make)
    own_pem, certificates = _load_certificates(directory / "host.pem", make)
    key_pem, key = _load_key(directory / "host.key", make)
    path, own = directory / "host.pem", certificates[0]
    if len(certificates) != 1:
        raise CertError(f"{path} holds {len(certificates)} certificates: keep only the one of host {host}")
    if not _same_key(own, key):
        raise CertError(f"{directory / 'host.key'} is not the key of {path}: copy both from one place, or {renew}")
    _check_host_name(path, own, host, trust_domain)
    _check_signed(path, own, roots, now)
    _check_dates(path, own, now, renew)
    return HostAuthority(trust_domain, host, roots_pem, Issued(own_pem, key_pem), own.not_valid_after_utc.timestamp())


def load_root(directory: Path, now: float) -> tuple[str, Issued, bytes]:
    """Trust domain, signing root, all of `root.pem`: during a change of root it holds two, and one has the key."""
    make, path = "make it with `underpass ca init`", directory / "root.pem"
    roots_pem, roots = _load_certificates(path, make)
    key_pem, key = _load_key(directory / "root.key", make)
    root = next((root for root in roots if _same_key(root, key)), None)
    if root is None:
        raise CertError(f"{directory / 'root.key'} is the key of no root in {path}: copy both from one place")
    trust_domain = (_signer_uri(path, root) or "").removeprefix("spiffe://")
    if not trust_domain or "/" in trust_domain:
        raise CertError(f"{path} names no trust domain, so it is no mesh root: {make}")
    _check_dates(path, root, now, "make a new root with `underpass ca init`")
    return trust_domain, Issued(root.public_bytes(serialization.Encoding.PEM), key_pem), roots_pem


def _load_certificates(path: Path, if_missing: str) -> tuple[bytes, list[x509.Certificate]]:
    pem = read_certificates(path, if_missing)
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except UNREADABLE:
        raise CertError(f"{path} is not a PEM certificate: {if_missing}") from None
    # Written anew from what was parsed: OpenSSL then sees these certificates only, without comments or other objects.
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates), certificates


def _load_key(path: Path, if_missing: str) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    pem = read_key(path, if_missing)
    try:
        key = serialization.load_pem_private_key(pem, None)
    except UNREADABLE:
        raise CertError(f"{path} is not a PEM key without password: {if_missing}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertError(f"{path} is not an elliptic-curve key: {if_missing}")
    return pem, key


def _same_key(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    try:
        return certificate.public_key() == key.public_key()
    except UNREADABLE:  # a key of a kind unknown here is certainly another one
        return False


def _check_host_name(path: Path, own: x509.Certificate, host: str, trust_domain: str) -> None:
    want, have = f"spiffe://{trust_domain}/{host}", _signer_uri(path, own)
    if have is None:
        raise CertError(f"{path} is no host intermediate: make one with `underpass ca host {host}`")
    if have != want:
        raise CertError(f"{path} is for {have!a}, not {want}: make one with `underpass ca host {host}`")


def _signer_uri(path: Path, certificate: x509.Certificate) -> str | None:
    """The one URI a signing certificate carries: its trust domain, or its host."""
    try:
        return only_uri(alternative_names(certificate)) if is_ca(certificate) else None
    except UNREADABLE:
        raise CertError(f"{path} has names that cannot be read: make it anew with `underpass ca`") from None


def _check_signed(path: Path, own: x509.Certificate, roots: list[x509.Certificate], now: float) -> None:
    signers = [root for root in roots if _signed_by(own, root)]
    if not signers:
        raise CertError(f"{path} is not signed by a root in root.pem: add its root there, or make it anew")
    # One key can have several certificates, from a renewed root; the longest-lived decides.
    root = max(signers, key=lambda root: root.not_valid_after_utc)
    _check_dates(path.with_name("root.pem"), root, now, "make a new root with `underpass ca init`")


def _signed_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _check_dates(path: Path, certificate: x509.Certificate, now: float, renew: str) -> None:
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if now < start:
        raise CertError(f"{path} is not valid before {date(start)}: set this host's clock ({date(now)}), or {renew}")
    if now >= end:
        raise CertError(f"{path} expired on {date(end)}: {renew}")
