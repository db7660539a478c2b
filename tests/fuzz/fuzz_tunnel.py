"""Fuzz what a peer can send: frames through the tunnel's state machine, and the payload of OPEN.

Run it with atheris (optional, not among the project's dependencies; `pip install atheris`), from the repository:

    .venv/bin/python -m tests.fuzz.fuzz_tunnel tests/fuzz/corpus/tunnel -max_len=8192 -max_total_time=600

New inputs land in the corpus directory; keep those that found something. tests/unit/test_fuzz_tunnel.py replays every
file of it through `one_input` without atheris.

Input: one byte picks what is fuzzed (modulo the number of STARTS: a state of the tunnel, or the payload of OPEN), one
byte the size of the pieces that arrive (0: all at once), the rest is what the peer sends.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from ipaddress import IPv4Address

from agent.tunnel import events as ev
from agent.tunnel import opening
from agent.tunnel.frames import HEADER_BYTES, MAX_OPEN, FrameType, ResetReason, frame
from agent.tunnel.opening import Opening
from agent.tunnel.stream import Role, Tunnel
from policy.identity import SpiffeId

OPENING = Opening(
    connection_id=bytes(range(16)),
    source=(IPv4Address("10.1.0.5"), 40312),
    destination=(IPv4Address("10.9.0.1"), 5432),
    identity=SpiffeId("bank.example", "a", "ledger"),
    service="accounts",
    traceparent=None,
    hops=0,
)


def _idle_opener() -> Tunnel:
    return Tunnel(Role.OPENER)


def _waiting_opener() -> Tunnel:
    tunnel = Tunnel(Role.OPENER)
    tunnel.open(OPENING)
    return tunnel


def _streaming_opener() -> Tunnel:
    tunnel = _waiting_opener()
    tunnel.receive(memoryview(frame(FrameType.OPENED)))
    return tunnel


def _resetting_opener() -> Tunnel:
    tunnel = _streaming_opener()
    tunnel.reset(ResetReason.IDLE)
    return tunnel


def _idle_acceptor() -> Tunnel:
    return Tunnel(Role.ACCEPTOR)


def _leaving_acceptor() -> Tunnel:
    tunnel = Tunnel(Role.ACCEPTOR)
    tunnel.goaway()
    return tunnel


def _ending_acceptor() -> Tunnel:
    tunnel = Tunnel(Role.ACCEPTOR)
    tunnel.receive(memoryview(frame(FrameType.OPEN, opening.encode(OPENING))))
    tunnel.opened()
    tunnel.eof()
    return tunnel


STARTS: tuple[Callable[[], Tunnel] | None, ...] = (
    None,  # the payload of OPEN
    _idle_opener,
    _waiting_opener,
    _streaming_opener,
    _resetting_opener,
    _idle_acceptor,
    _leaving_acceptor,
    _ending_acceptor,
)


def one_input(data: bytes) -> None:
    """Anything but an expected refusal escapes as an exception, and is a finding."""
    if len(data) < 2:
        return
    start = STARTS[data[0] % len(STARTS)]
    if start is None:
        check_opening(data[2:])
    else:
        check_tunnel(start(), data[2:], data[1] or len(data))


def check_opening(payload: bytes) -> None:
    try:
        value = opening.decode(payload)
    except ValueError:
        return
    assert opening.decode(opening.encode(value)) == value


def check_tunnel(tunnel: Tunnel, stream: bytes, size: int) -> None:
    received = 0
    for at in range(0, len(stream), size):
        received += _deliver(tunnel, stream[at : at + size])
    assert received <= len(stream)


def _deliver(tunnel: Tunnel, piece: bytes) -> int:
    """One read; the relay answers what it must, so that the machine goes on. Returns the bytes of DATA."""
    was_dropped = tunnel.dropped
    events = tunnel.receive(memoryview(piece))
    assert not (was_dropped and events)
    assert tunnel.buffered < HEADER_BYTES + MAX_OPEN
    assert tunnel.dropped == was_dropped or events[-1][0] == ev.VIOLATION
    for event in events:
        if event[0] == ev.PING:
            tunnel.pong(event[1])
        elif event[0] == ev.MUST_REFUSE:
            tunnel.refused(event[1])
        elif event[0] == ev.OPEN:
            tunnel.opened()
    if tunnel.owes_reset:
        tunnel.reset(ResetReason.APPLICATION)
    return sum(len(event[1]) for event in events if event[0] == ev.DATA)


def main() -> None:
    atheris = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
