"""Outcome records of both hosts to flows (pure): one per captured connection, as its source host saw it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Outcome = Mapping[str, Any]
FIELDS = (
    "source",
    "destination",
    "service",
    "verdict",
    "rule",
    "tls",
    "bytes_sent",
    "bytes_received",
    "connect_ms",
    "added_ms",
    "rtt_us",
)


def flows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """The last record of each connection says the most; a refusal in the kernel never had a connection."""
    last: dict[tuple[str, str | int], Outcome] = {}
    for number, outcome in enumerate(outcomes):
        if outcome["side"] == "source":
            key = outcome["connection"] or number
            last.pop((outcome["host"], key), None)  # so that the order is that of the last records
            last[outcome["host"], key] = outcome
    return [{field: outcome.get(field) for field in FIELDS} for outcome in last.values()]


def unmatched(source: Sequence[Outcome], destination: Sequence[Outcome]) -> list[str]:
    """Connections that ended well on one host and are not, or differently, or twice, on record on the other."""
    sent, received = _closed(source, "source"), _closed(destination, "destination")
    return sorted(
        connection for connection in sent.keys() | received.keys() if sent.get(connection) != received.get(connection)
    )


def closed(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome["event"] == "close" for outcome in outcomes)


def _closed(outcomes: Sequence[Outcome], side: str) -> dict[str, list[tuple[int, int]]]:
    """Bytes each way of every record of an end: a list, to notice a connection that ended twice."""
    ends: dict[str, list[tuple[int, int]]] = {}
    for outcome in outcomes:
        if outcome["event"] == "close" and outcome["side"] == side:
            ends.setdefault(outcome["connection"], []).append((outcome["bytes_sent"], outcome["bytes_received"]))
    return ends
