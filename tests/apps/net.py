"""What the sample applications share: addresses as text, exact reads, percentiles."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

Address = tuple[str, int]


def parse_address(text: str) -> Address:
    """`10.77.0.2:8583` or `[fd77::2]:8583`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not host or (":" in host) != host.startswith("["):
        raise ValueError(f"expected ADDRESS:PORT such as 10.77.0.2:8583 or [fd77::2]:8583, got {text!r}")
    return host.strip("[]"), int(port)


def show_address(address: tuple[str | int, ...]) -> str:
    """As accept() and getpeername() answer it; IPv6 ones have four parts."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(address, family=family, backlog=128)


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Fewer bytes only where the other side has ended."""
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: always a value that was really measured."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]
