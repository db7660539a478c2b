"""Who is the peer? Read the answer from the chain OpenSSL has verified. Pure.

Callers pass the *verified* path (leaf, intermediate, root), never what the peer sent: a peer may send any certificates
along, and only the path says which of them vouched for the leaf. Signatures, dates, key usage, path length and name
constraints are OpenSSL's; this module adds what a chain verifier does not know: what the names mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from policy.identity import SpiffeId, parse_uri

CHAIN_LENGTH = 3
SHOWN_CHARACTERS = 255

# What cryptography raises for a certificate it cannot read; several of these are not ValueErrors.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Reason(Enum):
    """Why a peer is refused; the value is the metric label."""

    CHAIN_LENGTH = "chain-length"
    UNREADABLE = "unreadable"
    LEAF_IS_CA = "leaf-is-ca"
    NAMES = "names"  # not exactly one URI, or names of other kinds
    NOT_AN_IDENTITY = "not-an-identity"
    TRUST_DOMAIN = "trust-domain"
    SERVER_NAME = "server-name"
    INTERMEDIATE_NAME = "intermediate-name"
    FOREIGN_HOST = "foreign-host"


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: Reason
    detail: str  # one line of printable ASCII, whatever the peer sent


def verify_peer(chain_der: Sequence[bytes], trust_domain: str) -> SpiffeId | Refusal:
    """The identity of the peer whose verified chain this is, or why it has none."""
    if len(chain_der) != CHAIN_LENGTH:
        detail = f"expected leaf, host intermediate and root, got {len(chain_der)} certificates"
        return Refusal(Reason.CHAIN_LENGTH, detail)
    try:
        leaf, intermediate = (x509.load_der_x509_certificate(der) for der in chain_der[:2])
        if is_ca(leaf):
            return Refusal(Reason.LEAF_IS_CA, "a certificate that can sign others is no application's")
        return _identity(alternative_names(leaf), alternative_names(intermediate), trust_domain)
    except UNREADABLE as error:
        return Refusal(Reason.UNREADABLE, f"a certificate of the chain cannot be read: {_shown(str(error))}")


def _identity(
    leaf_names: Sequence[x509.GeneralName], intermediate_names: Sequence[x509.GeneralName], trust_domain: str
) -> SpiffeId | Refusal:
    uri = only_uri(leaf_names)
    if uri is None:
        return Refusal(Reason.NAMES, "the leaf needs exactly one URI name, and beside it only DNS names")
    try:
        identity = parse_uri(uri)  # accepts lower-case letters, digits, dashes: no NUL, no escape, nothing to normalise
    except ValueError:
        return Refusal(Reason.NOT_AN_IDENTITY, f"expected spiffe://TRUST-DOMAIN/HOST/APPLICATION, got {_shown(uri)}")
    if identity.trust_domain != trust_domain:
        return Refusal(Reason.TRUST_DOMAIN, f"{identity.uri} is not of trust domain {trust_domain}")
    dns_names = [name.value for name in leaf_names if isinstance(name, x509.DNSName)]
    if dns_names not in ([], [identity.server_name]):
        return Refusal(Reason.SERVER_NAME, f"DNS name {_shown(','.join(dns_names))} is not that of {identity.uri}")
    vouches_for = only_uri(intermediate_names)
    if vouches_for is None:
        return Refusal(Reason.INTERMEDIATE_NAME, f"the intermediate of {identity.uri} does not name exactly one host")
    # An intermediate names its host by the exact identity prefix, so one comparison covers host and trust domain.
    if vouches_for != f"spiffe://{trust_domain}/{identity.host}":
        return Refusal(Reason.FOREIGN_HOST, f"{_shown(vouches_for)} issued {identity.uri}, a name of another host")
    return identity


def is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def only_uri(names: Sequence[x509.GeneralName]) -> str | None:
    """The one URI among `names`. None if there is not exactly one, or any name is neither URI nor DNS.

    The kind of a name is its ASN.1 tag: an identity spelled in an e-mail or other name is no identity.
    """
    if not all(isinstance(name, x509.UniformResourceIdentifier | x509.DNSName) for name in names):
        return None
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    return uris[0] if len(uris) == 1 else None


def _shown(text: str) -> str:
    return ascii(text[:SHOWN_CHARACTERS])
