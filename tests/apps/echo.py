"""An echo server and its client, for the laboratory: bytes come back exactly, and half-close works.

    python -m tests.apps.echo serve --listen 10.77.0.2:9000
    python -m tests.apps.echo client --connect 10.77.0.2:9000 --count 100 --size 200 [--json]

The client sends `--count` messages and waits for each, then ends its own direction in the middle of one more, which
must still come back whole before the server's end. Exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from tests.apps.net import Address, listen, parse_address, percentile, receive_exactly, show_address

TIMEOUT_S = 20


def serve(address: Address) -> None:
    """One JSON line says that it listens, and one for each connection whom accept() named."""
    with listen(address) as listener:
        print(json.dumps({"listening": show_address(listener.getsockname())}), flush=True)
        while True:
            connection, peer = listener.accept()
            print(json.dumps({"peer": show_address(peer)}), flush=True)
            threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def talk(address: Address, count: int, size: int) -> dict[str, Any]:
    started = time.perf_counter()
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connected = (time.perf_counter() - started) * 1000
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        names = {"peer": show_address(connection.getpeername()), "local": show_address(connection.getsockname())}
        first, *others = [_exchange(connection, os.urandom(size)) for _ in range(max(2, count))]
        _half_close(connection, os.urandom(size))
        return {
            "messages": len(others) + 1,
            "bytes": (len(others) + 2) * size,
            "connect_ms": connected,
            "first_ms": first,
            "p50_ms": percentile(others, 50),
            "p99_ms": percentile(others, 99),
            **names,
        }


def _exchange(connection: socket.socket, message: bytes) -> float:
    started = time.perf_counter()
    sender = threading.Thread(target=_send, args=(connection, message)) if len(message) > 1 << 15 else None
    if sender:  # neither side may wait for the other to read first
        sender.start()
    else:
        connection.sendall(message)
    reply = receive_exactly(connection, len(message))
    if sender:
        sender.join()
    _check(reply, message)
    return (time.perf_counter() - started) * 1000


def _send(connection: socket.socket, message: bytes) -> None:
    with suppress(OSError):  # the reader of the answers sees what happened
        connection.sendall(message)


def _half_close(connection: socket.socket, message: bytes) -> None:
    connection.sendall(message)
    connection.shutdown(socket.SHUT_WR)
    _check(receive_exactly(connection, len(message)), message)
    if connection.recv(1):
        raise ValueError("bytes after the end")


def _check(reply: bytes, message: bytes) -> None:
    if reply != message:
        raise ValueError(f"sent {len(message)} bytes, {len(reply)} came back, not the same")


def _client(address: Address, count: int, size: int, as_json: bool) -> int:
    try:
        result = talk(address, count, size)
    except (OSError, ValueError) as error:
        print(f"echo: {error}", file=sys.stderr)
        return 1
    text = "{messages} messages, p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms, {local} to {peer}, half-close kept"
    print(json.dumps(result) if as_json else text.format_map(result))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.apps.echo")
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("serve").add_argument("--listen", type=parse_address, required=True, metavar="ADDRESS:PORT")
    client = modes.add_parser("client")
    client.add_argument("--connect", type=parse_address, required=True, metavar="ADDRESS:PORT")
    client.add_argument("--count", type=int, default=100)
    client.add_argument("--size", type=int, default=200)
    client.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.mode == "client":
        return _client(given.connect, given.count, given.size, given.json)
    with suppress(KeyboardInterrupt):
        serve(given.listen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
