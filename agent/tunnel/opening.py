"""What OPEN says about a stream, and its payload: a PROXY v2 header with our own fields."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent.tunnel import proxy_v2
from agent.tunnel.proxy_v2 import SocketAddress
from policy.identity import LABEL, SpiffeId, parse_uri

NOOP = 0x04  # the only foreign field: padding, allowed any number of times
CONNECTION_ID = 0x05  # PROXY v2's unique id; 128 bytes there, exactly 16 here
IDENTITY = 0xE0
SERVICE = 0xE1
TRACEPARENT = 0xE2
HOPS = 0xE3
REQUIRED = frozenset({CONNECTION_ID, IDENTITY, SERVICE, HOPS})
KNOWN = REQUIRED | {TRACEPARENT}

CONNECTION_ID_BYTES = 16
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Opening:
    """One stream to be. `identity` is a claim until it has been compared with the peer's certificate."""

    connection_id: bytes
    source: SocketAddress  # the client as it sees itself
    destination: SocketAddress  # what it dialled
    identity: SpiffeId  # of the source
    service: str
    traceparent: str | None  # W3C Trace Context
    hops: int  # proxies passed so far; the loop guard

    def __post_init__(self) -> None:
        if len(self.connection_id) != CONNECTION_ID_BYTES:
            raise ValueError(f"connection id has {len(self.connection_id)} bytes; expected {CONNECTION_ID_BYTES}")
        if not (0 < self.source[1] <= 0xFFFF and 0 < self.destination[1] <= 0xFFFF):
            raise ValueError("source or destination has no port")
        if self.source[0].is_unspecified or self.destination[0].is_unspecified:
            raise ValueError("source or destination has no address")
        if not LABEL.fullmatch(self.service):
            raise ValueError(f"not a service name: {self.service[:64]!r}")
        if self.traceparent is not None and not _TRACEPARENT.fullmatch(self.traceparent):
            raise ValueError(f"not a traceparent: {self.traceparent[:64]!r}")
        if not 0 <= self.hops <= 0xFF:
            raise ValueError(f"hop count {self.hops} is not within 0 to 255")


def encode(opening: Opening) -> bytes:
    """The payload of OPEN; ValueError if an address has a scope."""
    fields = [
        (CONNECTION_ID, opening.connection_id),
        (IDENTITY, opening.identity.uri.encode("ascii")),
        (SERVICE, opening.service.encode("ascii")),
        (HOPS, bytes([opening.hops])),
    ]
    if opening.traceparent is not None:
        fields.append((TRACEPARENT, opening.traceparent.encode("ascii")))
    return proxy_v2.encode(proxy_v2.Header(opening.source, opening.destination, tuple(fields)))


def decode(payload: bytes) -> Opening:
    """ValueError, with a sentence for the peer's operator, on anything the specification does not allow."""
    header = proxy_v2.decode(payload)
    fields = _unique_fields(header)
    if len(fields[HOPS]) != 1:
        raise ValueError(f"hop count has {len(fields[HOPS])} bytes; expected 1")
    traceparent = _text(fields[TRACEPARENT]) if TRACEPARENT in fields else None
    return Opening(
        connection_id=fields[CONNECTION_ID],
        source=header.source,
        destination=header.destination,
        identity=parse_uri(_text(fields[IDENTITY])),
        service=_text(fields[SERVICE]),
        traceparent=traceparent,
        hops=fields[HOPS][0],
    )


def _unique_fields(header: proxy_v2.Header) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    for kind, value in header.tlvs:
        if kind == NOOP:
            continue
        if kind not in KNOWN:  # never skipped: a field we do not know may be the one that narrows access
            raise ValueError(f"field {kind:#04x} is not known")
        if kind in fields:
            raise ValueError(f"field {kind:#04x} comes twice")
        fields[kind] = value
    if missing := REQUIRED - fields.keys():
        raise ValueError(f"field {min(missing):#04x} is missing")
    return fields


def _text(value: bytes) -> str:
    if not value.isascii():
        raise ValueError("a text field is not ascii")
    return value.decode("ascii")
