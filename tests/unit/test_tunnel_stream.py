"""The tunnel's rules as scripts: frames in, events out; commands in, bytes out; what is not allowed, refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel import events as ev
from agent.tunnel import opening as opening_codec
from agent.tunnel.events import Event
from agent.tunnel.frames import (
    HEADER_BYTES,
    MAX_OPEN,
    FrameType,
    Refusal,
    RefusedReason,
    ResetReason,
    frame,
    refused_payload,
)
from agent.tunnel.opening import Opening
from agent.tunnel.stream import Role, Tunnel
from policy.identity import SpiffeId

OPENING = Opening(
    connection_id=bytes(16),
    source=(IPv4Address("10.1.0.5"), 40312),
    destination=(IPv4Address("10.9.0.1"), 5432),
    identity=SpiffeId("bank.example", "a", "ledger"),
    service="accounts",
    traceparent=None,
    hops=0,
)
DENIED = Refusal(RefusedReason.DENIED, 0, "no rule allows this")
UNREADABLE = Refusal(RefusedReason.BAD_OPEN, 0, "proxy header has no version 2 signature")
TOKEN = b"12345678"

OPEN = frame(FrameType.OPEN, opening_codec.encode(OPENING))
BAD_OPEN = frame(FrameType.OPEN, b"not a proxy header")
OPENED = frame(FrameType.OPENED)
REFUSED = frame(FrameType.REFUSED, refused_payload(DENIED))
DATA = frame(FrameType.DATA, b"bytes")
EOF = frame(FrameType.EOF)
RESET = frame(FrameType.RESET, bytes([ResetReason.APPLICATION]))
GOAWAY = frame(FrameType.GOAWAY)
PING = frame(FrameType.PING, TOKEN)
PONG = frame(FrameType.PONG, TOKEN)


@dataclass(frozen=True)
class In:
    """The peer sends `wire`; the relay must be told `events`."""

    wire: bytes
    events: tuple[tuple[int, object], ...] = ()


@dataclass(frozen=True)
class Out:
    """The relay commands; `wire` must go to the peer."""

    command: Callable[[Tunnel], bytes]
    wire: bytes


Step = In | Out


def plain(events: Iterable[Event]) -> tuple[tuple[int, object], ...]:
    return tuple((event[0], bytes(event[1]) if event[0] == ev.DATA else event[1]) for event in events)


def play(tunnel: Tunnel, steps: Iterable[Step]) -> Tunnel:
    for number, step in enumerate(steps):
        if isinstance(step, In):
            assert plain(tunnel.receive(memoryview(step.wire))) == step.events, f"step {number}"
        else:
            assert step.command(tunnel) == step.wire, f"step {number}"
    return tunnel


def opens(tunnel: Tunnel) -> bytes:
    return tunnel.open(OPENING)


def refuses(tunnel: Tunnel) -> bytes:
    return tunnel.refused(DENIED)


def resets(tunnel: Tunnel) -> bytes:
    return tunnel.reset(ResetReason.APPLICATION)


def pings(tunnel: Tunnel) -> bytes:
    return tunnel.ping(TOKEN)


def pongs(tunnel: Tunnel) -> bytes:
    return tunnel.pong(TOKEN)


GOT_DATA = In(DATA, ((ev.DATA, b"bytes"),))
GOT_EOF = In(EOF, ((ev.EOF, None),))
GOT_LAST_EOF = In(EOF, ((ev.EOF, None), (ev.ENDED, None)))
GOT_RESET = In(RESET, ((ev.RESET, ResetReason.APPLICATION),))
GOT_LAST_RESET = In(RESET, ((ev.RESET, ResetReason.APPLICATION), (ev.ENDED, None)))
GOT_OPEN = In(OPEN, ((ev.OPEN, OPENING),))
GOT_GOAWAY = In(GOAWAY, ((ev.GOAWAY, None),))
DRAINING = In(OPEN, ((ev.MUST_REFUSE, Refusal(RefusedReason.DRAINING)),))
SEND_EOF = Out(Tunnel.eof, EOF)
SEND_RESET = Out(resets, RESET)
SEND_GOAWAY = Out(Tunnel.goaway, GOAWAY)

OFFER = (Out(opens, OPEN),)
DIAL = (*OFFER, In(OPENED, ((ev.OPENED, None),)))
ANSWER = (GOT_OPEN, Out(Tunnel.opened, OPENED))
REFUSE = (GOT_OPEN, Out(refuses, REFUSED))

SCRIPTS: list[tuple[str, Role, tuple[Step, ...]]] = [
    ("the opener ends first", Role.OPENER, (*DIAL, GOT_DATA, SEND_EOF, GOT_DATA, GOT_LAST_EOF)),
    ("the acceptor ends first", Role.ACCEPTOR, (*ANSWER, SEND_EOF, GOT_DATA, GOT_LAST_EOF)),
    ("our eof is the last", Role.OPENER, (*DIAL, GOT_EOF, SEND_EOF)),
    ("the server speaks first", Role.OPENER, (*OFFER, In(OPENED + DATA, ((ev.OPENED, None), (ev.DATA, b"bytes"))))),
    ("a refusal ends the stream at once", Role.OPENER, (*OFFER, In(REFUSED, ((ev.REFUSED, DENIED),)))),
    ("a refused opener may try again", Role.OPENER, (*OFFER, In(REFUSED, ((ev.REFUSED, DENIED),)), *DIAL)),
    ("an acceptor that refused takes the next", Role.ACCEPTOR, (*REFUSE, *ANSWER)),
    ("a reset is answered by a reset", Role.ACCEPTOR, (*ANSWER, GOT_RESET, SEND_RESET)),
    ("a reset after our eof needs no answer", Role.ACCEPTOR, (*ANSWER, SEND_EOF, GOT_LAST_RESET)),
    ("our reset after the peer's eof ends the stream", Role.ACCEPTOR, (*ANSWER, GOT_EOF, SEND_RESET)),
    ("data on its way while we reset is discarded", Role.OPENER, (*DIAL, SEND_RESET, In(DATA), In(DATA), GOT_LAST_EOF)),
    ("resets cross", Role.OPENER, (*DIAL, SEND_RESET, GOT_LAST_RESET, *DIAL)),
    (
        "last frame and the next open arrive in one read",
        Role.ACCEPTOR,
        (*ANSWER, SEND_EOF, In(EOF + OPEN, ((ev.EOF, None), (ev.ENDED, None), (ev.OPEN, OPENING)))),
    ),
    (
        "a ping is answered, and may come again",
        Role.ACCEPTOR,
        (In(PING, ((ev.PING, TOKEN),)), Out(pongs, PONG), In(PING, ((ev.PING, TOKEN),)), Out(pongs, PONG)),
    ),
    ("our ping is answered", Role.OPENER, (Out(pings, PING), In(PONG, ((ev.PONG, TOKEN),)), Out(pings, PING))),
    ("goaway lets the current stream end", Role.OPENER, (*DIAL, GOT_GOAWAY, GOT_DATA, SEND_EOF, GOT_LAST_EOF)),
    ("goaway from both", Role.ACCEPTOR, (SEND_GOAWAY, GOT_GOAWAY)),
    (
        "an open that crossed our goaway is refused",
        Role.ACCEPTOR,
        (SEND_GOAWAY, DRAINING, Out(refuses, REFUSED)),
    ),
    (
        "an open may cross a goaway sent after our last frame",
        Role.ACCEPTOR,
        (*ANSWER, SEND_EOF, SEND_GOAWAY, GOT_LAST_EOF, DRAINING),
    ),
    (
        "an open that is none is refused, and the tunnel lives",
        Role.ACCEPTOR,
        (
            In(BAD_OPEN, ((ev.MUST_REFUSE, UNREADABLE),)),
            Out(refuses, REFUSED),
            *ANSWER,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("role", "steps"), [case[1:] for case in SCRIPTS], ids=[case[0] for case in SCRIPTS])
def test_script(role: Role, steps: tuple[Step, ...]) -> None:
    tunnel = play(Tunnel(role), steps)
    assert not tunnel.dropped


# Every state against every frame and every command. Letters: o OPEN, O OPENED, R REFUSED, d DATA, e EOF, r RESET,
# g GOAWAY, p PING, q PONG; what is not named must drop the tunnel, or raise.
FRAMES = {
    "o": OPEN, "O": OPENED, "R": REFUSED, "d": DATA, "e": EOF, "r": RESET, "g": GOAWAY, "p": PING, "q": PONG,
}  # fmt: skip
COMMANDS: dict[str, Callable[[Tunnel], bytes]] = {
    "o": opens, "O": Tunnel.opened, "R": refuses, "e": Tunnel.eof, "r": resets, "g": Tunnel.goaway, "p": pings,
    "q": pongs,
}  # fmt: skip
A, B = Role.ACCEPTOR, Role.OPENER
PINGED = (In(PING, ((ev.PING, TOKEN),)),)
STATES: list[tuple[str, Role, tuple[Step, ...], str, str]] = [
    # state, role, how to get there, frames that may come, commands that are legal
    ("opener idle", B, (), "gp", "ogp"),
    ("opener waiting", B, OFFER, "ORgp", "gp"),
    ("opener streaming", B, DIAL, "dergp", "ergp"),
    ("opener sent eof", B, (*DIAL, SEND_EOF), "dergp", "gp"),
    ("opener got eof", B, (*DIAL, GOT_EOF), "gp", "ergp"),
    ("opener sent reset", B, (*DIAL, SEND_RESET), "dergp", "gp"),
    ("opener owes a reset", B, (*DIAL, GOT_RESET), "gp", "rgp"),
    ("opener ended", B, (*DIAL, SEND_EOF, GOT_LAST_EOF), "gp", "ogp"),
    ("opener refused", B, (*OFFER, In(REFUSED, ((ev.REFUSED, DENIED),))), "gp", "ogp"),
    ("opener goes away", B, (SEND_GOAWAY,), "gp", "p"),
    ("opener was told to go away", B, (GOT_GOAWAY,), "p", "gp"),
    ("opener pinged", B, (Out(pings, PING),), "gpq", "og"),
    ("opener was pinged", B, PINGED, "g", "ogpq"),
    ("acceptor idle", A, (), "ogp", "gp"),
    ("acceptor offered", A, (GOT_OPEN,), "gp", "ORgp"),
    ("acceptor streaming", A, ANSWER, "dergp", "ergp"),
    ("acceptor sent eof", A, (*ANSWER, SEND_EOF), "dergp", "gp"),
    ("acceptor got eof", A, (*ANSWER, GOT_EOF), "gp", "ergp"),
    ("acceptor sent reset", A, (*ANSWER, SEND_RESET), "dergp", "gp"),
    ("acceptor owes a reset", A, (*ANSWER, GOT_RESET), "gp", "rgp"),
    ("acceptor ended", A, (*ANSWER, GOT_EOF, SEND_EOF), "ogp", "gp"),
    ("acceptor refused", A, REFUSE, "ogp", "gp"),
    ("acceptor goes away, one open may cross", A, (SEND_GOAWAY,), "ogp", "p"),
    ("acceptor must refuse the crossed one", A, (SEND_GOAWAY, DRAINING), "gp", "Rp"),
    ("acceptor refused the crossed one", A, (SEND_GOAWAY, DRAINING, Out(refuses, REFUSED)), "gp", "p"),
    ("acceptor went away before its answer", A, (GOT_OPEN, SEND_GOAWAY, Out(refuses, REFUSED)), "gp", "p"),
    ("acceptor went away before its last frame", A, (*ANSWER, SEND_GOAWAY, SEND_EOF, GOT_LAST_EOF), "gp", "p"),
    ("acceptor was told of no more", A, (GOT_GOAWAY,), "p", "gp"),
    ("dropped by a violation", A, (In(EOF, ((17, "eof to the acceptor is not allowed while idle"),)),), "", ""),
]
STATE_IDS = [state[0] for state in STATES]


@pytest.mark.parametrize("letter", FRAMES)
@pytest.mark.parametrize(("_", "role", "steps", "may_come", "__"), STATES, ids=STATE_IDS)
def test_a_frame_that_may_not_come_drops_the_tunnel(
    _: str, role: Role, steps: tuple[Step, ...], may_come: str, __: str, letter: str
) -> None:
    tunnel = play(Tunnel(role), steps)
    was_dropped = tunnel.dropped
    events = plain(tunnel.receive(memoryview(FRAMES[letter])))
    assert tunnel.dropped == (letter not in may_come)
    assert (ev.VIOLATION in dict(events)) == (tunnel.dropped and not was_dropped)
    if tunnel.dropped:
        assert tunnel.receive(memoryview(GOAWAY)) == ()
        assert not tunnel.can_send


@pytest.mark.parametrize("letter", COMMANDS)
@pytest.mark.parametrize(("_", "role", "steps", "__", "legal"), STATES, ids=STATE_IDS)
def test_a_command_that_is_not_legal_raises_and_changes_nothing(
    _: str, role: Role, steps: tuple[Step, ...], __: str, legal: str, letter: str
) -> None:
    tunnel = play(Tunnel(role), steps)
    assert tunnel.can_send == ("e" in legal)
    assert tunnel.owes_reset == ("r" in legal and "e" not in legal)
    if letter in legal:
        assert COMMANDS[letter](tunnel)[0] == FRAMES[letter][0]
        return
    if tunnel.dropped and letter in "ORrq":  # answers: the drop may have come in the same read as the question
        assert COMMANDS[letter](tunnel) == b""
        return
    before = tunnel.phase, tunnel.can_send, tunnel.sent_last, tunnel.going_away, tunnel.awaits_pong
    with pytest.raises(RuntimeError, match=tunnel.phase.value):
        COMMANDS[letter](tunnel)
    assert before == (tunnel.phase, tunnel.can_send, tunnel.sent_last, tunnel.going_away, tunnel.awaits_pong)


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (frame(FrameType.RESET, b"\x09"), "unknown reason 9"),
        (b"\x03\x00\x00\x03\x63\x00\x00", "unknown reason"),
        (b"\x04\x00\x00\x00", "type 4 with 0 bytes"),
        (b"\x0a\x00\x00\x00", "type 10 with 0 bytes"),
        (b"\x09\x00\x00\x08" + b"another!", "pong without its ping"),
        (b"GET / HTTP/1.1\r\n", "type 71"),
    ],
)
def test_malformed_payloads_drop_the_tunnel_with_a_reason(wire: bytes, reason: str) -> None:
    tunnel = play(Tunnel(Role.OPENER), OFFER if wire[0] == FrameType.REFUSED else DIAL)
    (event,) = tunnel.receive(memoryview(wire))
    assert event[0] == ev.VIOLATION
    assert reason in event[1]
    assert tunnel.dropped


def test_a_pong_must_echo_its_ping() -> None:
    tunnel = play(Tunnel(Role.OPENER), [Out(pings, PING)])
    (event,) = tunnel.receive(memoryview(frame(FrameType.PONG, b"another!")))
    assert event == (ev.VIOLATION, "pong without its ping to the opener is not allowed while idle")


def test_what_came_before_a_violation_is_delivered_and_nothing_after_it() -> None:
    tunnel = play(Tunnel(Role.OPENER), DIAL)
    kinds = [event[0] for event in tunnel.receive(memoryview(DATA + OPEN + DATA))]
    assert kinds == [ev.DATA, ev.VIOLATION]


def test_a_frame_that_cannot_be_written_changes_nothing() -> None:
    tunnel = Tunnel(Role.OPENER)
    with pytest.raises(ValueError, match="8 to 8 bytes"):
        tunnel.ping(b"short")
    with pytest.raises(ValueError, match="scope"):
        tunnel.open(replace(OPENING, source=(ip_address("fe80::1%eth0"), 1)))
    assert tunnel.idle
    assert not tunnel.awaits_pong


def test_a_hundred_streams_on_one_tunnel() -> None:
    opener, acceptor = Tunnel(Role.OPENER), Tunnel(Role.ACCEPTOR)
    for number in range(100):
        play(acceptor, [In(opener.open(OPENING), ((ev.OPEN, OPENING),))])
        play(opener, [In(acceptor.opened(), ((ev.OPENED, None),))])
        data = frame(FrameType.DATA, number.to_bytes(2, "big"))
        for peer in (opener, acceptor):
            play(peer, [In(data, ((ev.DATA, data[HEADER_BYTES:]),))])
        first, second = (opener, acceptor) if number % 2 else (acceptor, opener)
        play(second, [In(first.eof(), ((ev.EOF, None),))])
        play(first, [In(second.eof(), ((ev.EOF, None), (ev.ENDED, None)))])
        assert opener.idle
        assert acceptor.idle


STARTS = [(role, steps) for _, role, steps, _, _ in STATES]
pieces = st.one_of(st.sampled_from([*FRAMES.values(), BAD_OPEN]), st.binary(max_size=12))


@given(st.sampled_from(STARTS), st.lists(pieces, max_size=8).map(b"".join), st.lists(st.integers(0, 10_000)))
def test_any_bytes_in_any_chunks_give_the_same_events_and_raise_nothing(
    start: tuple[Role, tuple[Step, ...]], stream: bytes, cuts: list[int]
) -> None:
    whole, cut = play(Tunnel(start[0]), start[1]), play(Tunnel(start[0]), start[1])
    at_once = plain(whole.receive(memoryview(stream)))
    places = sorted({0, len(stream), *(place % (len(stream) + 1) for place in cuts)})
    piecewise: list[tuple[int, object]] = []
    for begin, end in pairwise(places):
        piecewise += plain(cut.receive(memoryview(stream)[begin:end]))
        assert cut.buffered < HEADER_BYTES + MAX_OPEN
    assert merged(piecewise) == merged(at_once)
    assert (cut.phase, cut.can_send, cut.owes_reset) == (whole.phase, whole.can_send, whole.owes_reset)


def merged(events: Iterable[tuple[int, object]]) -> list[tuple[int, object]]:
    result: list[tuple[int, object]] = []
    for kind, payload in events:
        before = result[-1][1] if result and result[-1][0] == kind == ev.DATA else None
        if isinstance(before, bytes) and isinstance(payload, bytes):
            result[-1] = (kind, before + payload)
        else:
            result.append((kind, payload))
    return result
