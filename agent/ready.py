"""Telling systemd: sd_notify(3) without a library, three lines of protocol."""

from __future__ import annotations

import os
import socket


def notify(text: str) -> None:
    """Send e.g. "READY=1"; nothing happens outside of systemd."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.sendall(text.encode())
