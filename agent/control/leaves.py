"""The leaf certificates of this host's identities: issued, renewed in time, kept when renewal fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from agent.certs.authority import CertError, Leaf
from agent.certs.issuer import Issuer, renew_at
from agent.snapshot import LeafText
from policy.identity import SpiffeId

RETRY_S = 5.0  # also the shortest time between two leaves: near the intermediate's end lifetimes shrink to nothing


class Leaves:
    """`failed` gets one line for each renewal that did not succeed; the old leaf then stays until it expires."""

    def __init__(
        self,
        issuer: Issuer,
        identities: Iterable[SpiffeId],
        failed: Callable[[str], None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._issuer = issuer
        self._leaves: dict[SpiffeId, Leaf | None] = dict.fromkeys(identities)
        self._due: dict[SpiffeId, float] = dict.fromkeys(self._leaves, 0.0)
        self._failed = failed
        self._jitter = jitter
        self.issued = 0
        self.failures = 0

    def renew(self, now: float) -> bool:
        """Issue what is due; whether anything changed. `now` is wall-clock seconds: certificates are dated by it."""
        changed = False
        for identity, due in self._due.items():
            if due > now and not self._ends_early(identity, now):
                continue
            try:
                leaf = self._issuer.issue(identity, now)
            except CertError as error:
                self.failures += 1
                self._failed(f"no new certificate for {identity.uri}: {error}")
                self._due[identity] = now + RETRY_S
                continue
            self._leaves[identity] = leaf
            self._due[identity] = max(renew_at(leaf, self._jitter()), now + RETRY_S)
            self.issued += 1
            changed = True
        return changed

    def _ends_early(self, identity: SpiffeId, now: float) -> bool:
        """The clock jumped forward: what was planned for later is due now. A jump back only renews early."""
        leaf = self._leaves[identity]
        return leaf is not None and leaf.not_after <= now and self._due[identity] > now + RETRY_S

    def texts(self) -> tuple[LeafText, ...]:
        return tuple(
            LeafText(
                leaf.identity.uri,
                leaf.chain_pem.decode(),
                leaf.key_pem.decode(),
                leaf.not_before,
                leaf.not_after,
                leaf.serial,
            )
            for leaf in self._leaves.values()
            if leaf is not None
        )

    def expiries(self) -> dict[str, float]:
        return {identity.uri: leaf.not_after if leaf else 0.0 for identity, leaf in self._leaves.items()}
