"""Frames of the tunnel: a 4-byte header (type, 24-bit length), then the payload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from types import MappingProxyType

HEADER = Struct(">I")  # type and length as one word: one unpack per frame is what the byte path can afford
HEADER_BYTES = 4
MAX_OPEN = 4096
MAX_DATA = 65536
# A DATA payload of this size makes a frame that fills one TLS record, so the peer reads it whole and never splits it.
RECORD_DATA = 16384 - HEADER_BYTES
MAX_TEXT = 200
PING_BYTES = 8


class FrameType(IntEnum):
    OPEN = 1
    OPENED = 2
    REFUSED = 3
    DATA = 4
    EOF = 5
    RESET = 6
    GOAWAY = 7
    PING = 8
    PONG = 9


# Smallest and largest payload of each type; whatever lies outside is a protocol error.
LIMITS: Mapping[int, tuple[int, int]] = MappingProxyType(
    {
        FrameType.OPEN: (1, MAX_OPEN),
        FrameType.OPENED: (0, 0),
        FrameType.REFUSED: (3, 3 + MAX_TEXT),
        FrameType.DATA: (1, MAX_DATA),
        FrameType.EOF: (0, 0),
        FrameType.RESET: (1, 1),
        FrameType.GOAWAY: (0, 0),
        FrameType.PING: (PING_BYTES, PING_BYTES),
        FrameType.PONG: (PING_BYTES, PING_BYTES),
    }
)

DATA_WORD = FrameType.DATA << 24  # header word of a DATA frame, less its length


class RefusedReason(IntEnum):
    """Why no stream came to be; nothing was delivered."""

    DENIED = 1  # the destination's policy says no
    NO_ROUTE = 2  # the service has no endpoint here
    CONNECT_REFUSED = 3
    CONNECT_TIMEOUT = 4
    CONNECT_FAILED = 5  # any other errno of the dial
    NO_IDENTITY = 6  # the identity in OPEN is not the one of the certificate
    WRONG_DESTINATION = 7  # OPEN names a service or address that the served identity does not own
    OVERLOADED = 8
    DRAINING = 9
    BAD_OPEN = 10
    LOOP = 11


class ResetReason(IntEnum):
    """Why a stream was cut."""

    APPLICATION = 1  # the application's connection was reset
    REVOKED = 2  # policy or certificate changed
    IDLE = 3
    SHUTDOWN = 4
    INTERNAL = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """What REFUSED carries."""

    reason: RefusedReason
    errno: int = 0  # Linux errno of the failed dial; 0 = none
    text: str = ""


def header(kind: FrameType, length: int) -> bytes:
    return HEADER.pack(kind << 24 | length)


def data_header_into(buffer: bytearray | memoryview, length: int, offset: int = 0) -> None:
    """Write the header of a DATA frame in place, before `length` payload bytes that are there already."""
    if not 0 < length <= MAX_DATA:
        raise ValueError(f"a data frame carries 1 to {MAX_DATA} bytes, not {length}")
    HEADER.pack_into(buffer, offset, DATA_WORD + length)


def frame(kind: FrameType, payload: bytes = b"") -> bytes:
    """A whole frame, for everything but the byte path."""
    smallest, largest = LIMITS[kind]
    if not smallest <= len(payload) <= largest:
        raise ValueError(f"a {kind.name} frame carries {smallest} to {largest} bytes, not {len(payload)}")
    return header(kind, len(payload)) + payload


def refused_payload(refusal: Refusal) -> bytes:
    """The text is made printable and cut here, so that no caller has to care what an error message contains."""
    printable = "".join(char if char.isprintable() else "?" for char in refusal.text)
    text = printable.encode()[:MAX_TEXT].decode(errors="ignore").encode()  # never half a character
    return bytes([refusal.reason]) + refusal.errno.to_bytes(2, "big") + text


def parse_refused(payload: bytes) -> Refusal:
    """ValueError if the reason is unknown or the text could not go to a log as it is."""
    reason = RefusedReason(payload[0])
    text = payload[3:].decode()
    if not text.isprintable():
        raise ValueError("text is not printable")
    return Refusal(reason, int.from_bytes(payload[1:3], "big"), text)
