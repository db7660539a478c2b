"""An authorisation switch: answers 0100 with 0110 and 0800 with 0810. Plaintext, and it has never heard of Underpass.

    python -m tests.apps.switch --listen 10.77.0.2:8583

One JSON line on standard output says that it listens, and one for each connection whom accept() named.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
from contextlib import suppress

from tests.apps.iso import Message, pack, receive, unpack
from tests.apps.net import listen, parse_address, show_address

APPROVED, NOT_SUPPORTED = "00", "40"
ANSWERS = {"0100": "0110", "0800": "0810"}
ECHOED = ("2", "3", "4", "7", "11", "37", "41", "42", "49", "70")


def answer(request: Message) -> Message:
    kind = request["t"]
    reply = {field: request[field] for field in ECHOED if field in request}
    reply["t"] = ANSWERS.get(kind, f"{kind[:2]}{int(kind[2]) + 1}{kind[3]}")
    reply["39"] = APPROVED if kind in ANSWERS else NOT_SUPPORTED
    if kind == "0100":
        reply["38"] = request["11"]  # an authorisation code that is easy to follow in a trace
    return reply


def serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, suppress(ConnectionError):
        while request := receive(connection):
            connection.sendall(pack(answer(unpack(request))))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.apps.switch")
    parser.add_argument("--listen", type=parse_address, required=True, metavar="ADDRESS:PORT")
    with listen(parser.parse_args().listen) as listener:
        print(json.dumps({"listening": show_address(listener.getsockname())}), flush=True)
        while True:
            connection, peer = listener.accept()
            print(json.dumps({"peer": show_address(peer)}), flush=True)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
