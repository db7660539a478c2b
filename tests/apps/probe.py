"""Dials again and again and says what came of it: one JSON line each, until its standard input ends.

    python -m tests.apps.probe --connect 10.77.0.2:5432 [--every 0.05] [--once]

It speaks just enough of PostgreSQL to know that the real server answered: an SSLRequest, to which one byte comes back.
A line has `at` (seconds, monotonic clock), `result` ("ok" or the errno's name) and `step` (connect or answer); an
"ok" also has `peer` and `local`, what the socket said about both ends.
"""

from __future__ import annotations

import argparse
import errno
import json
import select
import socket
import struct
import sys
import time
from typing import Any

from tests.apps.net import Address, parse_address, show_address

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
TIMEOUT_S = 3


def probe(address: Address) -> dict[str, Any]:
    at, step = time.monotonic(), "connect"
    try:
        with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
            step = "answer"
            peer, local = show_address(connection.getpeername()), show_address(connection.getsockname())
            connection.sendall(SSL_REQUEST)
            if connection.recv(1) not in (b"N", b"S"):
                raise ConnectionResetError(errno.ECONNRESET, "ended without an answer")
    except OSError as error:
        return {"at": at, "step": step, "result": _name(error)}
    return {"at": at, "step": step, "result": "ok", "peer": peer, "local": local}


def _name(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(error.errno or 0, str(error))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.apps.probe")
    parser.add_argument("--connect", type=parse_address, required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--every", type=float, default=0.05, help="seconds")
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    while True:
        print(json.dumps(probe(given.connect)), flush=True)
        if given.once or select.select([sys.stdin], [], [], given.every)[0]:
            return


if __name__ == "__main__":
    main()
