"""What is measured (pure): works, and how long and how often in a quick and in a full run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

NONE, UNDERPASS, ENVOY = "none", "underpass", "envoy"
PEERS = ("haproxy", "nginx", "stunnel", ENVOY)
ARMS = (NONE, *PEERS, UNDERPASS)


class Kind(Enum):
    """The values are the load generator's modes; `same_host` and `connect` have a stage of their own."""

    RR = "rr"
    FIXED = "fixed"
    CPS = "cps"
    BULK = "bulk"
    SAME_HOST = "same-host"
    CONNECT = "connect"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    kind: Kind
    connections: int
    size: int = 200
    rate: int = 0
    turns: int = 1  # of each arm in one round; their median counts, so that one burst of the machine hits one of three

    @property
    def arms(self) -> tuple[str, ...]:
        """Peers have no capture and no direct way on one host: there is nothing of theirs to compare."""
        if self.kind in (Kind.SAME_HOST, Kind.CONNECT):
            return (NONE, UNDERPASS)
        return ARMS[1:] if self.kind is Kind.IDLE else ARMS


RR32 = Work("rr-200", Kind.RR, 32)
FIXED = Work("fixed-1k", Kind.FIXED, 16, 1024, 1000, 3)
CPS = Work("cps", Kind.CPS, 16)
BULKS = (Work("bulk", Kind.BULK, 1), Work("bulk", Kind.BULK, 4))
SAME_HOST = Work("same-host", Kind.SAME_HOST, 32)
CONNECT = Work("connect", Kind.CONNECT, 1)
CAPTURED, UNCAPTURED = "connect-captured", "connect-uncaptured"  # as which CONNECT appears in the results
IDLE = Work("idle", Kind.IDLE, 10_000)


@dataclass(frozen=True, slots=True)
class Plan:
    """`seconds` for one arm at one work in one round; `idle_seconds` at most to open the idle connections; `connects`:
    so often is connect() timed in one batch."""

    works: tuple[Work, ...]
    rounds: int
    seconds: float
    warmup: float
    idle: Work
    idle_rounds: int
    idle_seconds: float
    connects: int = 400


_RR = tuple(
    Work(f"rr-{name}", Kind.RR, connections, size)
    for name, size in (("200", 200), ("1k", 1024))
    for connections in (1, 16, 32, 64)
)
_REST = (FIXED, CPS, *BULKS, SAME_HOST, CONNECT)
_QUICK_RR = tuple(work for work in _RR if work == RR32 or work.connections == 1)

FULL = Plan((*_RR, *_REST), 5, 1.6, 0.2, IDLE, 2, 30.0)
QUICK = Plan((*_QUICK_RR, *_REST), 3, 0.8, 0.15, replace(IDLE, connections=1000), 2, 10.0)


def fitted(plan: Plan, connections: int) -> Plan:
    """No more idle connections than that; the figures are those of each, or of 10,000."""
    return replace(plan, idle=replace(plan.idle, connections=min(plan.idle.connections, connections)))


def narrowed(plan: Plan, names: Sequence[str], rounds: int | None) -> Plan:
    """Only the works of these names (none: all), and so many rounds."""
    known = {work.name for work in (*plan.works, plan.idle)}
    if unknown := set(names) - known:
        raise ValueError(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    works = tuple(work for work in plan.works if not names or work.name in names)
    idle_rounds = plan.idle_rounds if not names or plan.idle.name in names else 0
    if rounds is not None:
        idle_rounds = min(rounds, idle_rounds)
    return replace(plan, works=works, rounds=plan.rounds if rounds is None else rounds, idle_rounds=idle_rounds)


def rotated(arms: Sequence[str], by: int) -> list[str]:
    """Each arm comes first in turn: whoever follows a heavy one must not always be the same."""
    start = by % len(arms) if arms else 0
    return [*arms[start:], *arms[:start]]
