"""Make the three kinds of certificate of a mesh: root, host intermediate, leaf. Time is passed in, as epoch seconds.

A stolen intermediate must be worth one host only. Two independent checks say so: the name constraints below, which
OpenSSL enforces on the leaf's DNS name, and `verify.verify_peer`, which compares the host in both URI names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from policy.identity import SpiffeId

# A peer whose clock runs behind would refuse a certificate made this very second.
BACKDATE_S = 60
YEAR_S = 365 * 86400
ROOT_LIFETIME_S = 10 * YEAR_S
HOST_LIFETIME_S = YEAR_S
LEAF_LIFETIME_S = 3600

# Kinds differ in the organisation, so that no subject can equal its issuer's. Application `a` on host `a` would
# otherwise be "self-issued" (RFC 5280 6.1), which path length and name constraints treat as a special case.
ROOT_KIND, HOST_KIND, LEAF_KIND = "underpass mesh", "underpass host", "underpass application"


class CertError(ValueError):
    """A certificate or key that cannot be used; the message tells the operator what to do."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that can sign, with its key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)  # a log line must never carry a key


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one application identity needs to open and accept tunnels."""

    identity: SpiffeId
    chain_pem: bytes  # leaf, then intermediate; the root is what the peer has
    key_pem: bytes = field(repr=False)
    not_before: float
    not_after: float
    serial: int


def make_root(trust_domain: str, now: float, lifetime_s: float = ROOT_LIFETIME_S) -> Issued:
    _check_names(trust_domain, "x")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(ROOT_KIND, "root")
    builder = _builder(name, name, key, key, now - BACKDATE_S, now + lifetime_s)
    builder = _add_ca(builder, f"spiffe://{trust_domain}", path_length=1)
    return _sign(builder, key, key)


def make_intermediate(
    root: Issued, trust_domain: str, host: str, now: float, lifetime_s: float = HOST_LIFETIME_S
) -> Issued:
    _check_names(trust_domain, host)
    issuer, issuer_key = load_pair(root)
    key = ec.generate_private_key(ec.SECP256R1())
    subject, end = _subject(HOST_KIND, host), _capped_end(issuer, now, lifetime_s)
    builder = _builder(subject, issuer.subject, key, issuer_key, now - BACKDATE_S, end)
    builder = _add_ca(builder, f"spiffe://{trust_domain}/{host}", path_length=0)
    # A URI constraint can name only the trust domain (RFC 5280 4.2.1.10: it covers the host part of a URI, not the
    # path), so the DNS constraint is the one that ties this certificate to its host.
    allowed = [x509.DNSName(f"{host}.{trust_domain}"), x509.UniformResourceIdentifier(trust_domain)]
    builder = builder.add_extension(x509.NameConstraints(allowed, None), critical=True)
    return _sign(builder, key, issuer_key)


def make_leaf(intermediate: Issued, identity: SpiffeId, now: float, lifetime_s: float = LEAF_LIFETIME_S) -> Leaf:
    issuer, issuer_key = load_pair(intermediate)
    key = ec.generate_private_key(ec.SECP256R1())
    subject, end = _subject(LEAF_KIND, identity.application), _capped_end(issuer, now, lifetime_s)
    builder = _builder(subject, issuer.subject, key, issuer_key, now - BACKDATE_S, end)
    # The DNS name is there for the name constraint: without it OpenSSL would have nothing to compare with the host.
    names = [x509.UniformResourceIdentifier(identity.uri), x509.DNSName(identity.server_name)]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    issued = _sign(builder, key, issuer_key)
    made = x509.load_pem_x509_certificate(issued.certificate_pem)
    return Leaf(
        identity=identity,
        chain_pem=issued.certificate_pem + intermediate.certificate_pem,
        key_pem=issued.key_pem,
        not_before=made.not_valid_before_utc.timestamp(),
        not_after=made.not_valid_after_utc.timestamp(),
        serial=made.serial_number,
    )


def load_pair(issued: Issued) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = serialization.load_pem_private_key(issued.key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertError("the signing key is not an elliptic-curve key: make a new one with `underpass ca`")
    return x509.load_pem_x509_certificate(issued.certificate_pem), key


def _check_names(trust_domain: str, host: str) -> None:
    try:
        SpiffeId(trust_domain, host, "x")
    except ValueError:
        raise CertError(
            f"not a trust domain and host name: {trust_domain!r}, {host!r}; use lower-case letters, digits and dashes"
        ) from None


def _capped_end(issuer: x509.Certificate, now: float, lifetime_s: float) -> float:
    # A leaf that outlives its issuer looks valid to whoever schedules its renewal, and is refused by every peer.
    end = min(now + lifetime_s, issuer.not_valid_after_utc.timestamp())
    if end <= now:
        raise CertError(f"the issuing certificate expired on {date(end)}: renew it with `underpass ca`")
    return end


def date(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _subject(kind: str, name: str) -> x509.Name:
    parts = [(NameOID.ORGANIZATION_NAME, kind), (NameOID.COMMON_NAME, name)]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: float,
    end: float,
) -> x509.CertificateBuilder:
    own, issuers = key.public_key(), issuer_key.public_key()
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=own)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(datetime.fromtimestamp(int(start), UTC))
    builder = builder.not_valid_after(datetime.fromtimestamp(int(end), UTC))
    # VERIFY_X509_STRICT wants both key identifiers; they also pick the right root while two of them overlap.
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers), critical=False)


def _add_ca(builder: x509.CertificateBuilder, uri: str, path_length: int) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> Issued:
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    certificate = builder.sign(issuer_key, hashes.SHA256())
    return Issued(certificate.public_bytes(pem), key.private_bytes(pem, form, serialization.NoEncryption()))
