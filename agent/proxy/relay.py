"""Bytes both ways between an application's socket and a stream, until both directions have ended.

Back-pressure: each direction holds at most one read (64 KiB class), and meanwhile the side it came from is not read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from array import array
from collections.abc import Callable, Sequence

from agent.proxy.latency import AddedLatency
from agent.proxy.link import Link
from agent.proxy.loop import EDGE, ERROR, HANGUP, READ, WRITE, Loop
from agent.tunnel import events as ev
from agent.tunnel.events import Event, Events
from agent.tunnel.frames import HEADER_BYTES, RECORD_DATA, ResetReason, data_header_into

# Four records in one write: fewer calls for bulk, and still within the bound on what one direction may hold.
READ_BYTES = 4 * (RECORD_DATA + HEADER_BYTES) - HEADER_BYTES
LINGER_RESET = struct.pack("ii", 1, 0)
LINGER_NONE = struct.pack("ii", 0, 0)
LAST_FRAME_LIMIT_S = 30.0

Released = Callable[[Link, Sequence[Event]], None]
Finished = Callable[[str], None]

CLOSE_ENDED = "ended"
FROM_APP, TO_APP = 0, 1


def end_with_reset(sock: socket.socket) -> None:
    """However this process ends, also by SIGKILL, the application sees a reset and never takes half an answer for a
    whole one. Only an orderly end takes it back."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)


def abort(sock: socket.socket) -> None:
    """Close with RST: whoever is at the other end must not take it for an orderly end."""
    end_with_reset(sock)
    sock.close()


class Relay:
    """`released` gets the link back, with events not yet looked at, as soon as the stream has ended; `finished` is told
    once, when the application's socket is closed. On the source side the application is the client."""

    __slots__ = (
        "_app",
        "_app_events",
        "_buffer",
        "_finished",
        "_forward",
        "_lane",
        "_link",
        "_loop",
        "_moved",
        "_peer_ended",
        "_pending",
        "_released",
        "_view",
        "latency",
    )  # fmt: skip

    def __init__(
        self, loop: Loop, app: socket.socket, link: Link, buffer: bytearray, is_source: bool, released: Released,
        finished: Finished,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._app = app
        self._link: Link | None = link
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._released = released
        self._finished = finished
        self._forward = is_source  # bytes from the application are requests
        self._pending = bytearray()  # for the application, which does not take it now
        self._peer_ended = False
        self._app_events = READ
        self._moved = array("q", (0, 0))
        self.latency = AddedLatency()
        end_with_reset(app)
        link.owner = self
        loop.watch(app.fileno(), READ, self._app_ready)
        self._lane = link.begin_lane(app.fileno(), self, self._moved, self.latency.cells, is_source)

    @property
    def from_app(self) -> int:
        return self._moved[FROM_APP]

    @property
    def to_app(self) -> int:
        return self._moved[TO_APP]

    @property
    def link(self) -> Link | None:
        """None after the stream has ended and only the application's socket is left to flush."""
        return self._link

    def reset(self, reason: ResetReason, close_reason: str) -> None:
        """Cut the stream and the application's connection."""
        link = self._link
        if link is not None and link.tunnel.streaming:
            if link.tunnel.sent_last:
                self._close_app(close_reason, orderly=False)
                link.close(close_reason)  # after our last frame only dropping the tunnel tells the peer
                return
            link.send(link.tunnel.reset(reason))
            self._loop.after(LAST_FRAME_LIMIT_S, self._give_up)
        self._close_app(close_reason, orderly=False)
        self._settle()

    def _give_up(self) -> None:
        """The peer owes its last frame since our RESET; it must not hold the tunnel for ever."""
        if self._link is not None:
            self._link.close("the peer does not end the stream")

    # What is found, here or by the engine

    def app_ended(self, _detail: int = 0) -> None:
        link = self._link
        if link is None or self._app.fileno() < 0:
            return
        self._want(self._app_events & ~READ)
        if link.tunnel.can_send:
            link.send(link.tunnel.eof())
        self._settle()

    def app_lost(self, _errno: int = 0) -> None:
        if self._app.fileno() >= 0:
            self.reset(ResetReason.APPLICATION, "reset by the application")

    def app_full(self, rest: bytes | memoryview) -> None:
        """The application takes no more now: keep the rest, and stop reading the tunnel."""
        if self._app.fileno() < 0:
            return
        self._pending += rest
        self._want(self._app_events | WRITE)
        self._tell_lane()
        if self._link is not None:
            self._link.pause()

    def tunnel_full(self, frame: bytes) -> None:
        """The tunnel takes no more now: it keeps the frame, and the application is not read."""
        if self._link is not None:
            self._link.hold(frame)
            self._want(self._app_events & ~READ)

    # The application's side

    def _app_ready(self, mask: int) -> None:
        if mask & WRITE and self._pending:
            self._flush_app()
        if mask & READ and self._app_events & READ:
            self._read_app()
        elif mask & ERROR:
            self.app_lost()
        elif mask & HANGUP and not self._app_events & READ and self._app.fileno() >= 0:
            # An orderly end that we have yet to read up to, once the tunnel takes more; until then told only once.
            self._loop.change(self._app.fileno(), self._app_events | EDGE)

    def _read_app(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            size = self._app.recv_into(self._view[HEADER_BYTES:], READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.app_lost()
            return
        if not size:
            self.app_ended()
            return
        data_header_into(self._buffer, size)
        written = link.send(self._view[: HEADER_BYTES + size])
        self._moved[FROM_APP] += size
        self._cost(self._forward)
        if not written:
            self._want(self._app_events & ~READ)

    def _to_app(self, data: memoryview) -> None:
        self._moved[TO_APP] += len(data)
        if self._pending:
            self._pending += data
            return
        try:
            sent = self._app.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.app_lost()
            return
        if sent < len(data):
            self.app_full(data[sent:])
        self._cost(not self._forward)

    def _flush_app(self) -> None:
        try:
            sent = self._app.send(self._pending)
        except BlockingIOError:
            return
        except OSError:
            self.app_lost()
            return
        del self._pending[:sent]
        if self._pending:
            return
        self._tell_lane()
        self._want(self._app_events & ~WRITE)
        if self._peer_ended:
            self._shutdown_app()
        if self._link is not None:
            self._link.resume()
        else:
            self._close_app(CLOSE_ENDED, orderly=True)

    def _shutdown_app(self) -> None:
        with contextlib.suppress(OSError):  # it may be reset already; reading will tell
            self._app.shutdown(socket.SHUT_WR)

    def _want(self, events: int) -> None:
        if events != self._app_events and self._app.fileno() >= 0:
            self._app_events = events
            self._loop.change(self._app.fileno(), events)
            self._tell_lane()

    def _tell_lane(self) -> None:
        if self._lane is not None:
            self._lane.app_in = bool(self._app_events & READ)
            self._lane.app_out = not self._pending

    def _cost(self, is_request: bool) -> None:
        cost = time.monotonic_ns() - self._loop.woke_ns
        if is_request:
            self.latency.request(cost)
        else:
            self.latency.response(cost)

    # The tunnel's side

    def received(self, link: Link, events: Events) -> None:
        for at, event in enumerate(events):
            if event[0] == ev.DATA:
                if self._app.fileno() >= 0:
                    self._to_app(event[1])
            elif event[0] == ev.ENDED or (event[0] == ev.RESET and self._peer_reset(link, event[1])):
                self._release(link, events[at + 1 :])
                return
            elif event[0] == ev.EOF:
                self._peer_end()
            elif event[0] == ev.PING:
                link.send(link.tunnel.pong(event[1]))
            elif event[0] == ev.VIOLATION:
                link.close(f"protocol violation: {event[1]}")
            if self._link is None:
                return

    def _peer_end(self) -> None:
        self._peer_ended = True
        if not self._pending and self._app.fileno() >= 0:
            self._shutdown_app()

    def _peer_reset(self, link: Link, reason: ResetReason) -> bool:
        """Whether our answer ended the stream; if no answer was owed, ENDED follows."""
        self._close_app(f"reset by the peer: {reason.name.lower()}", orderly=False)
        if not link.tunnel.owes_reset:
            return False
        link.send(link.tunnel.reset(reason))
        return True

    def drained(self, link: Link) -> None:
        if link.tunnel.can_send:
            self._want(self._app_events | READ)

    def closed(self, link: Link, reason: str) -> None:
        """The tunnel is gone inside the stream: the application must see a reset, never an end of data."""
        self._link = None
        self._close_app(f"tunnel lost: {reason}", orderly=False)
        self._released(link, ())

    def _settle(self) -> None:
        """After our last frame: was it the last of the stream?"""
        if self._link is not None and self._link.tunnel.idle:
            self._release(self._link, ())

    def _release(self, link: Link, rest: Sequence[Event]) -> None:
        """Both sides have sent their last frame; `rest` may already be the next OPEN."""
        self._end_lane()
        self._link = None
        if not self._pending:
            self._close_app(CLOSE_ENDED, orderly=True)
        link.resume()
        self._released(link, rest)

    def _end_lane(self) -> None:
        if self._lane is not None:
            self._lane.end()
            self._lane = None  # the link's next stream has it

    def _close_app(self, reason: str, orderly: bool) -> None:
        if self._app.fileno() < 0:
            return
        self._end_lane()
        self._loop.forget(self._app.fileno())
        if orderly:
            with contextlib.suppress(OSError):
                self._app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
            self._app.close()
        else:
            self._pending.clear()
            abort(self._app)
        self._finished(reason)
