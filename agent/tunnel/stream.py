"""The state of one tunnel: which frames may come, which may go, and what each means to the relay.

Time, sockets and TLS belong to the relay. `receive` judges all frames of one read before the relay reacts to any. That
is sound, because an honest peer cannot have reacted yet to what we have not sent; it means that properties tell the
state after the whole read.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from agent.tunnel import events as ev
from agent.tunnel import opening as opening_codec
from agent.tunnel.decoder import Decoder, Frame
from agent.tunnel.events import DATA, Event, Events
from agent.tunnel.frames import FrameType, Refusal, RefusedReason, ResetReason, frame, parse_refused, refused_payload
from agent.tunnel.opening import Opening


class Role(Enum):
    OPENER = "opener"  # dialled the tunnel
    ACCEPTOR = "acceptor"


class Phase(Enum):
    IDLE = "idle"
    OPENING = "opening"  # OPEN sent (or received), not yet answered
    STREAMING = "streaming"
    DROPPED = "dropped"


class Tunnel:
    """One side of one tunnel. Public attributes are for reading; `can_send` is one, not a property, for speed."""

    __slots__ = (
        "_decoder",
        "_flowing",
        "_goaway_received",
        "_goaway_sent",
        "_open_may_come",
        "_ping_received",
        "_ping_sent",
        "_refusal_due",
        "can_send",
        "owes_reset",
        "peer_sent_last",
        "phase",
        "role",
        "sent_last",
    )

    def __init__(self, role: Role) -> None:
        self.role = role
        self.phase = Phase.IDLE
        self.can_send = False  # DATA and EOF are legal now
        self.owes_reset = False  # the peer reset the stream; our last frame must be reset()
        self.sent_last = False  # of the current or latest stream
        self.peer_sent_last = False
        self._decoder = Decoder()
        self._flowing = False  # DATA from the peer is legal and wanted
        self._open_may_come = role is Role.ACCEPTOR
        self._refusal_due = False
        self._goaway_sent = False
        self._goaway_received = False
        self._ping_sent: bytes | None = None
        self._ping_received: bytes | None = None

    @property
    def idle(self) -> bool:
        return self.phase is Phase.IDLE

    @property
    def streaming(self) -> bool:
        return self.phase is Phase.STREAMING

    @property
    def dropped(self) -> bool:
        return self.phase is Phase.DROPPED

    @property
    def going_away(self) -> bool:
        """Either side wants no stream after the current one."""
        return self._goaway_sent or self._goaway_received

    @property
    def awaits_pong(self) -> bool:
        return self._ping_sent is not None

    @property
    def buffered(self) -> int:
        """Bytes held back until their frame is whole: less than one OPEN."""
        return self._decoder.buffered

    # Receiving

    def receive(self, view: memoryview) -> Events:
        """Judge what was read. DATA slices point into `view`."""
        if self._flowing and (payload := self._decoder.whole_data(view)) is not None:
            return ((DATA, payload),)
        return () if self.dropped else self._judge(self._decoder.feed(view))

    def _judge(self, frames: list[Frame]) -> Events:
        events: list[Event] = []
        for kind, payload in frames:
            if isinstance(payload, memoryview):
                wrong = self._on_data(payload, events)
            elif isinstance(payload, bytes):
                wrong = _HANDLERS[kind](self, payload, events)
            else:
                wrong = payload
            if wrong is not None:
                self.drop()
                events.append((ev.VIOLATION, wrong))
                break
        return events

    def _on_data(self, payload: memoryview, events: list[Event]) -> str | None:
        if self._flowing:
            events.append((DATA, payload))
            return None
        # After our RESET the peer's DATA is still on its way; nobody is left to read it.
        return None if self._peer_may_send() else self._misplaced("data")

    def _on_open(self, payload: bytes, events: list[Event]) -> str | None:
        if self.phase is not Phase.IDLE or not self._open_may_come:
            return self._misplaced("open")
        self._begin()
        if self._goaway_sent:
            self._open_may_come = False  # one OPEN can have crossed our GOAWAY, not two
            events.append(self._due(Refusal(RefusedReason.DRAINING)))
            return None
        try:
            events.append((ev.OPEN, opening_codec.decode(payload)))
        except ValueError as error:
            # Frames are intact and nothing was carried: the peer's operator gets to read why.
            events.append(self._due(Refusal(RefusedReason.BAD_OPEN, text=str(error))))
        return None

    def _due(self, refusal: Refusal) -> Event:
        self._refusal_due = True
        return ev.MUST_REFUSE, refusal

    def _on_opened(self, _: bytes, events: list[Event]) -> str | None:
        if self.role is not Role.OPENER or self.phase is not Phase.OPENING:
            return self._misplaced("opened")
        self._flow()
        events.append((ev.OPENED, None))
        return None

    def _on_refused(self, payload: bytes, events: list[Event]) -> str | None:
        if self.role is not Role.OPENER or self.phase is not Phase.OPENING:
            return self._misplaced("refused")
        try:
            events.append((ev.REFUSED, parse_refused(payload)))
        except ValueError:
            return "refused with an unknown reason or a text that is not printable"
        self.phase = Phase.IDLE
        return None

    def _on_eof(self, _: bytes, events: list[Event]) -> str | None:
        if not self._peer_may_send():
            return self._misplaced("eof")
        events.append((ev.EOF, None))
        self._peer_ends(events)
        return None

    def _on_reset(self, payload: bytes, events: list[Event]) -> str | None:
        if not self._peer_may_send():
            return self._misplaced("reset")
        try:
            events.append((ev.RESET, ResetReason(payload[0])))
        except ValueError:
            return f"reset with unknown reason {payload[0]}"
        self.owes_reset = not self.sent_last
        self.can_send = False
        self._peer_ends(events)
        return None

    def _on_goaway(self, _: bytes, events: list[Event]) -> str | None:
        if self._goaway_received:
            return self._misplaced("second goaway")
        self._goaway_received = True
        self._open_may_come = False
        events.append((ev.GOAWAY, None))
        return None

    def _on_ping(self, payload: bytes, events: list[Event]) -> str | None:
        if self._ping_received is not None:
            return self._misplaced("second ping before its pong")
        self._ping_received = payload
        events.append((ev.PING, payload))
        return None

    def _on_pong(self, payload: bytes, events: list[Event]) -> str | None:
        if payload != self._ping_sent:
            return self._misplaced("pong without its ping")
        self._ping_sent = None
        events.append((ev.PONG, payload))
        return None

    # Sending: each returns the bytes to write next, whole, after any frame that is half written. RuntimeError if it is
    # not legal now; but an answer to a tunnel that has been dropped is empty, because the drop can have come in the
    # same read as the event that it answers, and a peer must not be able to make the relay raise.

    def open(self, opening: Opening) -> bytes:
        self._require(self.role is Role.OPENER and self.idle and not self.going_away, "open")
        question = frame(FrameType.OPEN, opening_codec.encode(opening))
        self._begin()
        return question

    def opened(self) -> bytes:
        if self.dropped:
            return b""
        self._require(self._offered() and not self._refusal_due, "opened")
        self._flow()
        return frame(FrameType.OPENED)

    def refused(self, refusal: Refusal) -> bytes:
        if self.dropped:
            return b""
        self._require(self._offered(), "refused")
        answer = frame(FrameType.REFUSED, refused_payload(refusal))
        self.phase = Phase.IDLE
        self._refusal_due = False
        return answer

    def eof(self) -> bytes:
        self._require(self.can_send, "eof")
        self._end()
        return frame(FrameType.EOF)

    def reset(self, reason: ResetReason) -> bytes:
        """Not after eof(): then only drop() is left, see docs/tunnel.md."""
        if self.dropped:
            return b""
        self._require(self.streaming and not self.sent_last, "reset")
        self._flowing = False
        self._end()
        return frame(FrameType.RESET, bytes([reason]))

    def goaway(self) -> bytes:
        self._require(not self.dropped and not self._goaway_sent, "goaway")
        self._goaway_sent = True
        # An OPEN can only cross this if the opener needed nothing more from us before it sent one.
        self._open_may_come = self._open_may_come and (self.idle or (self.streaming and self.sent_last))
        return frame(FrameType.GOAWAY)

    def ping(self, payload: bytes) -> bytes:
        self._require(not self.dropped and self._ping_sent is None, "ping")
        question = frame(FrameType.PING, payload)
        self._ping_sent = payload
        return question

    def pong(self, payload: bytes) -> bytes:
        if self.dropped:
            return b""
        self._require(payload == self._ping_received, "pong")
        self._ping_received = None
        return frame(FrameType.PONG, payload)

    def drop(self) -> None:
        """The connection is closed, by us or by the peer. Inside a stream this is a reset, never an end of data."""
        self.phase = Phase.DROPPED
        self.can_send = self.owes_reset = self._flowing = False

    # Steps shared by both directions

    def _begin(self) -> None:
        self.phase = Phase.OPENING
        self.sent_last = self.peer_sent_last = False

    def _flow(self) -> None:
        self.phase = Phase.STREAMING
        self.can_send = self._flowing = True

    def _end(self) -> None:
        self.sent_last = True
        self.can_send = self.owes_reset = False
        self._settle()

    def _peer_ends(self, events: list[Event]) -> None:
        self.peer_sent_last = True
        self._flowing = False
        self._settle()
        if self.idle:
            events.append((ev.ENDED, None))

    def _settle(self) -> None:
        if self.sent_last and self.peer_sent_last:
            self.phase = Phase.IDLE

    def _peer_may_send(self) -> bool:
        return self.streaming and not self.peer_sent_last

    def _offered(self) -> bool:
        return self.role is Role.ACCEPTOR and self.phase is Phase.OPENING

    def _misplaced(self, what: str) -> str:
        state = self.phase.value + (", after its last frame" if self.streaming and self.peer_sent_last else "")
        return f"{what} to the {self.role.value} is not allowed while {state}"

    def _require(self, legal: bool, what: str) -> None:
        if not legal:
            raise RuntimeError(f"{what} sent by the {self.role.value} while {self.phase.value}")


_HANDLERS: dict[int, Callable[[Tunnel, bytes, list[Event]], str | None]] = {
    FrameType.OPEN: Tunnel._on_open,
    FrameType.OPENED: Tunnel._on_opened,
    FrameType.REFUSED: Tunnel._on_refused,
    FrameType.EOF: Tunnel._on_eof,
    FrameType.RESET: Tunnel._on_reset,
    FrameType.GOAWAY: Tunnel._on_goaway,
    FrameType.PING: Tunnel._on_ping,
    FrameType.PONG: Tunnel._on_pong,
}
