"""ISO 8583 messages on a stream: two bytes of length, big-endian, then the message in ASCII."""

from __future__ import annotations

import socket

import iso8583
import iso8583.specs

from tests.apps.net import receive_exactly

Message = dict[str, str]
SPEC = iso8583.specs.default_ascii


def pack(message: Message) -> bytes:
    raw, _ = iso8583.encode(message, SPEC)
    return len(raw).to_bytes(2) + bytes(raw)


def unpack(body: bytes) -> Message:
    message, _ = iso8583.decode(body, SPEC)
    return dict(message)


def receive(connection: socket.socket) -> bytes | None:
    """One message. None where the other side has ended between two; ConnectionError where it ended within one."""
    head = receive_exactly(connection, 2)
    if not head:
        return None
    body = receive_exactly(connection, int.from_bytes(head))
    if len(head) < 2 or len(body) < int.from_bytes(head):
        raise ConnectionError("the other side ended within a message")
    return body
