"""TCP segments to connections and the bytes each way (pure). Bytes without a place are counted, never lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.world.pcap import ACK, SYN, Segment

Address = tuple[str, int]
_HALF = 1 << 31


@dataclass(frozen=True, slots=True)
class Stream:
    """One direction of one connection. `unplaced`: bytes behind a gap, before the beginning, or sent twice with
    different contents, where nobody can say what the receiver read."""

    source: Address
    data: bytes = b""
    unplaced: int = 0


@dataclass(frozen=True, slots=True)
class Connection:
    """`client` sent the SYN."""

    client: Stream
    server: Stream


@dataclass(slots=True)
class _Pieces:
    """`base`: the sequence number of the first byte; None while the capture has not seen this direction begin."""

    source: Address
    base: int | None = None
    found: list[tuple[int, bytes]] = field(default_factory=list)


def reassemble(segments: Iterable[Segment]) -> list[Connection]:
    """In the order in which they began. A port may be used again: another SYN begins another connection."""
    current: dict[frozenset[Address], tuple[_Pieces, _Pieces]] = {}
    everything: list[tuple[_Pieces, _Pieces]] = []
    for segment in segments:
        key = frozenset((segment.source, segment.target))
        if key not in current or _begins_another(segment, current[key]):
            current[key] = (_Pieces(segment.source), _Pieces(segment.target))
            everything.append(current[key])
        client, server = current[key]
        _add(client if segment.source == client.source else server, segment)
    return [Connection(_join(client), _join(server)) for client, server in everything]


def _begins_another(segment: Segment, pair: tuple[_Pieces, _Pieces]) -> bool:
    client = pair[0]
    asks = segment.flags & (SYN | ACK) == SYN
    return asks and (segment.source, _first(segment)) != (client.source, client.base)  # equal: sent again


def _add(pieces: _Pieces, segment: Segment) -> None:
    if segment.flags & SYN:
        pieces.base = _first(segment)
    if segment.payload:
        pieces.found.append((_first(segment), segment.payload))


def _first(segment: Segment) -> int:
    """The number of its first byte: a SYN takes one itself."""
    return (segment.sequence + bool(segment.flags & SYN)) % (1 << 32)


def _join(pieces: _Pieces) -> Stream:
    base = pieces.base
    if base is None:
        return Stream(pieces.source, unplaced=sum(len(payload) for _, payload in pieces.found))
    data, unplaced = bytearray(), 0
    for offset, payload in sorted((_distance(base, first), payload) for first, payload in pieces.found):
        known = data[max(offset, 0) : max(offset, 0) + len(payload)]
        if offset < 0 or offset > len(data) or not payload.startswith(known):
            unplaced += len(payload)
        else:
            data += payload[len(known) :]
    return Stream(pieces.source, bytes(data), unplaced)


def _distance(base: int, number: int) -> int:
    """Signed, because sequence numbers wrap and a keep-alive probe lies one before the base."""
    return (number - base + _HALF) % (1 << 32) - _HALF
