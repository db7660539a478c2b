"""Who issues the leaves of this host, and when to renew one."""

from __future__ import annotations

from typing import Protocol

from agent.certs.authority import BACKDATE_S, LEAF_LIFETIME_S, CertError, Leaf, make_leaf
from agent.certs.store import HostAuthority
from policy.identity import SpiffeId

RENEW_FROM, RENEW_TO = 0.50, 0.65


class Issuer(Protocol):
    """Contract: a leaf for exactly this identity, or CertError. The caller keeps its old leaf until it has the new."""

    def issue(self, identity: SpiffeId, now: float) -> Leaf: ...


class EmbeddedIssuer:
    """Signs on the host itself with the host's intermediate: no other machine is needed to rotate."""

    def __init__(self, authority: HostAuthority, lifetime_s: float = LEAF_LIFETIME_S) -> None:
        self._authority = authority
        self._lifetime_s = lifetime_s

    def issue(self, identity: SpiffeId, now: float) -> Leaf:
        own = self._authority
        # Every verifier would refuse such a leaf; saying so here names the cause where it can be mended.
        if (identity.trust_domain, identity.host) != (own.trust_domain, own.host):
            raise CertError(f"{identity.uri} is not of host {own.host} in {own.trust_domain}: issue it on its own host")
        return make_leaf(own.intermediate, identity, now, self._lifetime_s)


def renew_at(leaf: Leaf, jitter01: float) -> float:
    """When to ask for the next leaf: between 50 % and 65 % of the lifetime.

    The spread keeps identities that started together from renewing together for ever; half a lifetime is left for
    retries. The back-dated minute is not part of the lifetime: of a leaf of a minute it would be half.
    """
    issued = leaf.not_before + BACKDATE_S
    return issued + (leaf.not_after - issued) * (RENEW_FROM + (RENEW_TO - RENEW_FROM) * jitter01)
