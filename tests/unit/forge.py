"""For tests: a small mesh, and certificates no honest authority would issue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.certs.authority import Issued, Leaf, load_pair, make_intermediate, make_root
from policy.identity import SpiffeId

TD = "mesh.test"
NOW = time.time()  # OpenSSL compares with the real clock
PEM = serialization.Encoding.PEM
LEDGER_A, TELLER_B = SpiffeId(TD, "a", "ledger"), SpiffeId(TD, "b", "teller")

uri, dns = x509.UniformResourceIdentifier, x509.DNSName


@dataclass(frozen=True)
class Mesh:
    root: Issued
    a: Issued
    b: Issued


def make_mesh() -> Mesh:
    root = make_root(TD, NOW)
    return Mesh(root, make_intermediate(root, TD, "a", NOW), make_intermediate(root, TD, "b", NOW))


def forge(
    issuer: Issued | None,
    names: Sequence[x509.GeneralName],
    *,
    ca: bool = False,
    start: float = NOW - 60,
    end: float = NOW + 3600,
    identifiers: bool = True,
) -> Issued:
    """A certificate with exactly these names; self-signed without issuer; no name constraints."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"forged {x509.random_serial_number()}"[:64])])
    issuer_name, issuer_key = subject, key
    if issuer is not None:
        certificate, issuer_key = load_pair(issuer)
        issuer_name = certificate.subject
    builder = x509.CertificateBuilder(issuer_name, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(datetime.fromtimestamp(int(start), UTC))
    builder = builder.not_valid_after(datetime.fromtimestamp(int(end), UTC))
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if identifiers:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(identifier, critical=False)
    signed = builder.sign(issuer_key, hashes.SHA256())
    form, open_ = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return Issued(signed.public_bytes(PEM), key.private_bytes(PEM, form, open_))


def as_leaf(forged: Issued, identity: SpiffeId, *above: Issued) -> Leaf:
    """`forged` with the certificates it sends along, under the identity it claims."""
    chain = b"".join(one.certificate_pem for one in (forged, *above))
    return Leaf(identity, chain, forged.key_pem, NOW - 60, NOW + 3600, 1)


def der(*issued: Issued | bytes) -> list[bytes]:
    """The DER of each certificate in these, in order."""
    pem = b"".join(one if isinstance(one, bytes) else one.certificate_pem for one in issued)
    return [one.public_bytes(serialization.Encoding.DER) for one in x509.load_pem_x509_certificates(pem)]
