"""Everything a role needs to decide and act, as one value: built whole by control, swapped whole by the others. Pure.

It travels as JSON in a memory file (agent/channel.py). Texts travel rather than parsed objects: every role parses them
with the same functions of policy/, so there is no second format to keep in step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class LeafText:
    """A leaf certificate with its key; sent to proxies only."""

    identity: str  # URI form
    chain_pem: str
    key_pem: str
    not_before: float  # seconds since the epoch
    not_after: float
    serial: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`generation` rises with every change. `policies` and `services` are (source name, YAML text)."""

    generation: int
    policies: tuple[tuple[str, str], ...]
    services: tuple[str, str]
    roots_pem: str
    leaves: tuple[LeafText, ...]

    def without_keys(self) -> Snapshot:
        """What hooks gets: it decides nothing and holds no keys."""
        return Snapshot(self.generation, self.policies, self.services, "", ())


def encode(snapshot: Snapshot) -> bytes:
    return json.dumps(asdict(snapshot)).encode()


def decode(data: bytes) -> Snapshot:
    raw = json.loads(data)
    return Snapshot(
        generation=raw["generation"],
        policies=tuple((source, text) for source, text in raw["policies"]),
        services=(raw["services"][0], raw["services"][1]),
        roots_pem=raw["roots_pem"],
        leaves=tuple(LeafText(**leaf) for leaf in raw["leaves"]),
    )
