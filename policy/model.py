"""What a policy says and what it is about: rules, requests, decisions, services. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from policy.fields import IPAddress, SocketAddress
from policy.identity import LABEL, SpiffeId

ANY = "*"
DEFAULT_RULE = "default"  # names the decision that no rule made; no rule may have this name


class Effect(Enum):
    ALLOW = "allow"
    DENY = "deny"


class SameNode(Enum):
    """How two applications of one host talk: as they always did, or over mutual TLS as well."""

    DIRECT = "direct"
    MTLS = "mtls"


class Verdict(Enum):
    ALLOW = "allow"
    DENY = "deny"


class Reason(Enum):
    ALLOWED = "allowed"
    DENIED_BY_RULE = "denied_by_rule"
    NO_MATCHING_RULE = "no_matching_rule"
    NO_IDENTITY = "no_identity"
    FOREIGN_TRUST_DOMAIN = "foreign_trust_domain"
    NO_POLICY = "no_policy"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Identities of the mesh as HOST/APPLICATION, each a name or "*".

    Whole segments only, deliberately weaker than a regex: nobody has to wonder what "a/led*" or a bare dot admits.
    """

    host: str
    application: str

    def __str__(self) -> str:
        return f"{self.host}/{self.application}"

    def matches(self, identity: SpiffeId, trust_domain: str) -> bool:
        """Whether `identity` is one of ours and fits; "*/*" never reaches into another trust domain."""
        return (
            identity.trust_domain == trust_domain
            and self.host in (ANY, identity.host)
            and self.application in (ANY, identity.application)
        )


def parse_pattern(text: str) -> Pattern:
    """Parse "a/ledger", "*/ledger", "a/*" or "*/*"; ValueError on anything else."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part == ANY or LABEL.fullmatch(part) for part in parts):
        raise ValueError(f'expected HOST/APPLICATION, each a name or "*", got {text[:130]!r}')
    return Pattern(parts[0], parts[1])


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports from `low` to `high`, both included."""

    low: int
    high: int

    def __contains__(self, port: int) -> bool:
        return self.low <= port <= self.high

    def __len__(self) -> int:
        return self.high - self.low + 1

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Empty `sources`, `services` or `ports` match nothing; `ports` None is every port of the service."""

    name: str
    effect: Effect
    sources: tuple[Pattern, ...]
    services: tuple[str, ...]
    ports: tuple[PortRange, ...] | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    version: int
    same_node: SameNode
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """May `source` talk to `service` on `port`, served by `destination`? `source` None is a caller nobody knows."""

    source: SpiffeId | None
    destination: SpiffeId
    service: str
    port: int


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    rule: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`port` is the port to dial at the far side when it is not the one the application dialled."""

    host: str
    address: IPAddress
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """`addresses` are virtual: nothing answers there, they exist only to be dialled and captured."""

    name: str
    application: str
    ports: tuple[PortRange, ...]
    endpoints: tuple[Endpoint, ...]
    addresses: tuple[IPAddress, ...] = ()

    def identity(self, endpoint: Endpoint, trust_domain: str) -> SpiffeId:
        """Who has to answer at this endpoint."""
        return SpiffeId(trust_domain, endpoint.host, self.application)

    @property
    def captured(self) -> tuple[IPAddress, ...]:
        """Every address an application may dial for this service."""
        return tuple(dict.fromkeys([*(endpoint.address for endpoint in self.endpoints), *self.addresses]))


@dataclass(frozen=True, slots=True)
class MeshHost:
    name: str
    tunnel: SocketAddress


@dataclass(frozen=True, slots=True)
class Directory:
    hosts: Mapping[str, MeshHost]
    services: Mapping[str, Service]
