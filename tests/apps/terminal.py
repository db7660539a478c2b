"""A payment terminal: signs on with 0800, then sends 0100s with an 0800 echo test now and then, and checks each answer.

    python -m tests.apps.terminal --connect 10.77.0.2:8583 --count 300

Prints one JSON object: counts, round trips in milliseconds (without the first, which pays for everything new), and
what the socket said about both ends. Exits 1 on an answer that is wrong or missing.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.apps.iso import Message, pack, receive, unpack
from tests.apps.net import parse_address, percentile, show_address

PAN = "4000001234567899"
ECHO_TEST_EVERY = 10
TIMEOUT_S = 20
_ANSWERS = {"0100": "0110", "0800": "0810"}


def authorisation(number: int, pan: str) -> Message:
    """About 200 bytes, as an authorisation usually is."""
    return {
        "t": "0100",
        "2": pan,
        "3": "000000",
        "4": f"{number * 100:012d}",
        "7": "1122093015",
        "11": f"{number:06d}",
        "12": "093015",
        "13": "1122",
        "14": "2812",
        "18": "5411",
        "22": "051",
        "25": "00",
        "35": f"{pan}=28121010000000000",
        "37": f"{number:012d}",
        "41": "UNDERP01",
        "42": "UNDERPASSBANK01",
        "49": "978",
    }


def network(number: int, code: str) -> Message:
    return {"t": "0800", "7": "1122093015", "11": f"{number:06d}", "70": code}


def script(count: int, pan: str) -> list[Message]:
    """A sign-on (code 001), then `count` messages of which every tenth is an echo test (301)."""
    later = range(2, count + 2)
    return [network(1, "001")] + [
        network(number, "301") if number % ECHO_TEST_EVERY == 0 else authorisation(number, pan) for number in later
    ]


def exchange(connection: socket.socket, request: Message) -> float:
    """One message and its answer; the round trip in milliseconds, without our own packing and unpacking."""
    raw = pack(request)
    started = time.perf_counter()
    connection.sendall(raw)
    body = receive(connection)
    took = (time.perf_counter() - started) * 1000
    if body is None:
        raise ConnectionError(f"no answer to {request['t']} {request['11']}: the switch ended the connection")
    reply = unpack(body)
    if (reply["t"], reply["11"], reply["39"]) != (_ANSWERS[request["t"]], request["11"], "00"):
        raise ValueError(f"wrong answer to {request['t']} {request['11']}: {reply}")
    return took


def talk(address: tuple[str, int], messages: Sequence[Message]) -> dict[str, Any]:
    started = time.perf_counter()
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connected = (time.perf_counter() - started) * 1000
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        first, *others = [exchange(connection, message) for message in messages]
        return {
            "authorisations": sum(message["t"] == "0100" for message in messages),
            "network_messages": sum(message["t"] == "0800" for message in messages),
            "connect_ms": connected,
            "first_ms": first,
            "p50_ms": percentile(others, 50),
            "p99_ms": percentile(others, 99),
            "peer": show_address(connection.getpeername()),
            "local": show_address(connection.getsockname()),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.apps.terminal")
    parser.add_argument("--connect", type=parse_address, required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--count", type=int, default=100, help="messages after the sign-on")
    parser.add_argument("--pan", default=PAN)
    given = parser.parse_args()
    if given.count < 1:
        parser.error("--count: at least 1")
    try:
        print(json.dumps(talk(given.connect, script(given.count, given.pan))))
    except (OSError, ValueError) as error:
        print(f"terminal: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
