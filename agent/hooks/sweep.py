"""Entries of `flows` that nobody took back: a connect() that failed between its hook and its SYN leaves a reservation,
and a handshake that died in an overfull accept queue leaves an entry. Both would fill the table in the end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from agent import records
from agent.bpfcall import Map

_SECOND = 1_000_000_000
RESERVED_NS = 30 * _SECOND  # from the hook to the SYN is one system call, unless TCP Fast Open defers the SYN
PUBLISHED_NS = 300 * _SECOND  # twice the longest series of SYN retries (tcp_syn_retries: 127 s)


@dataclass(frozen=True, slots=True)
class Swept:
    reservations: int = 0
    entries: int = 0


def expired(key: bytes, value: bytes, now_ns: int) -> bool:
    age: int = now_ns - records.FLOW.unpack(value)[2]
    return age > (RESERVED_NS if is_reservation(key) else PUBLISHED_NS)


def is_reservation(key: bytes) -> bool:
    return bool(records.TUPLE.unpack(key)[0] == 0)


def sweep(flows: Map, capacity: int, now_ns: int) -> Swept:
    # A key that goes away while we stand on it sends the walk back to the start: bounded, or it might never end.
    old = [key for key, value in islice(flows.items(), 2 * capacity) if expired(key, value, now_ns)]
    gone = [key for key in dict.fromkeys(old) if flows.delete(key)]
    reservations = sum(map(is_reservation, gone))
    return Swept(reservations, len(gone) - reservations)
