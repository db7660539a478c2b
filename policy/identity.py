"""SPIFFE identities of one mesh: `spiffe://TRUST-DOMAIN/HOST/APPLICATION`.

Source: SPIFFE-ID.md sections 2.1 to 2.3 (scheme, trust domain, path), narrowed: exactly two path segments, lower case.
The narrowing makes the DNS form (`APPLICATION.HOST.TRUST-DOMAIN`, used as TLS server name) one to one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123 label, lower case
MAX_URI_BYTES = 255  # also the limit of a DNS name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """One application on one host of one mesh."""

    trust_domain: str
    host: str
    application: str

    def __post_init__(self) -> None:
        labels = [*self.trust_domain.split("."), self.host, self.application]
        if not all(LABEL.fullmatch(label) for label in labels) or len(self.uri) > MAX_URI_BYTES:
            raise ValueError(f"not an identity: {self.uri!r}; use lower-case letters, digits and dashes")

    @property
    def uri(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.host}/{self.application}"

    @property
    def short(self) -> str:
        return f"{self.host}/{self.application}"

    @property
    def server_name(self) -> str:
        """The DNS form, carried as TLS server name (SNI)."""
        return f"{self.application}.{self.host}.{self.trust_domain}"


def parse_uri(uri: str) -> SpiffeId:
    """Parse the URI form; ValueError on anything but the exact form (no port, query, escape, upper case or slash)."""
    prefix = "spiffe://"
    parts = uri.removeprefix(prefix).split("/")
    if not uri.startswith(prefix) or len(parts) != 3:
        raise ValueError(f"not an identity: {uri[:MAX_URI_BYTES]!r}; expected spiffe://TRUST-DOMAIN/HOST/APPLICATION")
    return SpiffeId(parts[0], parts[1], parts[2])


def parse_server_name(name: str, trust_domain: str) -> SpiffeId:
    """Parse the DNS form within a known trust domain; ValueError on anything else."""
    application, _, rest = name.partition(".")
    host, _, domain = rest.partition(".")
    if domain != trust_domain:
        raise ValueError(f"not a server name of {trust_domain}: {name[:MAX_URI_BYTES]!r}")
    return SpiffeId(domain, host, application)
