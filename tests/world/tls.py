"""Is this byte stream TLS 1.3? (pure) Only what is visible from outside: record headers and the two hellos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
CLIENT_HELLO, SERVER_HELLO = 1, 2
TLS13 = 0x0304
_HEADER = 5
_VERSIONS = (0x0301, 0x0303)  # what TLS 1.3 writes into a record; the true version is in an extension
_MAX_RECORD = (1 << 14) + 256
_SUPPORTED_VERSIONS = 43


@dataclass(frozen=True, slots=True)
class Records:
    """`kinds`: record types in order; `hello`: the first handshake message; `strange`: bytes from the first that is
    no TLS record on. A last record may be incomplete: the connection was cut."""

    kinds: tuple[int, ...]
    hello: bytes
    strange: int


def read_records(data: bytes) -> Records:
    kinds: list[int] = []
    first, at = b"", 0
    while at < len(data):
        header = data[at : at + _HEADER]
        if not _plausible(header, not kinds):
            break
        length = int.from_bytes(header[3:5]) if len(header) == _HEADER else 0
        kinds.append(header[0])
        first = first or data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
    return Records(tuple(kinds), first, max(0, len(data) - at))


def _plausible(header: bytes, first: bool) -> bool:
    kinds = (HANDSHAKE,) if first else (CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA)
    if header[0] not in kinds:
        return False
    if len(header) < _HEADER:
        return True  # cut off within the header
    return int.from_bytes(header[1:3]) in _VERSIONS and 0 < int.from_bytes(header[3:5]) <= _MAX_RECORD


def is_client_hello(message: bytes) -> bool:
    return message[:1] == bytes([CLIENT_HELLO])


def server_version(message: bytes) -> int | None:
    """The version a ServerHello chose: its supported_versions extension, or else the field that old versions use.
    None for anything that is no ServerHello."""
    if message[:1] != bytes([SERVER_HELLO]) or len(message) < 39:
        return None
    session = message[38]
    at = 39 + session + 3  # random and session id behind us; cipher suite and compression
    for kind, value in _extensions(message[at:]):
        if kind == _SUPPORTED_VERSIONS and len(value) == 2:
            return int.from_bytes(value)
    return int.from_bytes(message[4:6])


def _extensions(block: bytes) -> Iterator[tuple[int, bytes]]:
    end = min(len(block), 2 + int.from_bytes(block[:2]))
    at = 2
    while at + 4 <= end:
        kind, length = int.from_bytes(block[at : at + 2]), int.from_bytes(block[at + 2 : at + 4])
        yield kind, block[at + 4 : at + 4 + length]
        at += 4 + length
