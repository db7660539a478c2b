"""One TLS connection to another proxy, and the tunnel inside it: bytes in, events to the owner; frames out."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast

from agent.outcome import Tls
from agent.proxy.loop import READ, WRITE, Loop
from agent.tunnel.events import Events
from agent.tunnel.stream import Tunnel
from policy.identity import SpiffeId

if TYPE_CHECKING:
    from agent.proxy._engine import Lane
    from agent.proxy.relay import Relay

BUFFER_BYTES = 64 * 1024
MAX_HELD = 64  # frames; a relay stops after the first
RECORD_BYTES = 16 * 1024  # a read that fills a TLS record suggests that more records wait
READS_PER_WAKE = 8  # bounded, so that one bulk stream cannot starve the others of this worker
TCP_INFO_BYTES = 104
TCPI_RTT_AT = 68  # offset of tcpi_rtt in struct tcp_info (include/uapi/linux/tcp.h)


class LinkOwner(Protocol):
    """Who a link works for at the moment: the pool, a stream on its way, or a relay."""

    def received(self, link: Link, events: Events) -> None: ...

    def drained(self, link: Link) -> None:
        """Everything that `send` had to hold back is written."""

    def closed(self, link: Link, reason: str) -> None:
        """The connection is gone; called once, and never again after."""


class Link:
    """`send` may hold back what the socket does not take; the caller then stops until `drained`."""

    __slots__ = (
        "_buffer", "_events", "_held", "_lane", "_loop", "_paused", "_tls", "_view", "closed", "generation",
        "idle_since", "local", "owner", "peer", "tls_info", "tunnel",
    )  # fmt: skip

    def __init__(
        self, loop: Loop, tls: ssl.SSLSocket, tunnel: Tunnel, local: SpiffeId, peer: SpiffeId, tls_info: Tls,
        generation: int, owner: LinkOwner, buffer: bytearray,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._tls = tls
        self._buffer = buffer  # shared by all links of the worker: nothing stays in it between two calls
        self._view = memoryview(buffer)
        self._held: deque[bytes] = deque()
        self._paused = False
        self._events = READ
        self._lane = loop.lane(tls)  # if any, OpenSSL reads ahead: then it may hold what epoll does not know of
        self.tunnel = tunnel
        self.local = local
        self.peer = peer
        self.tls_info = tls_info
        self.generation = generation  # of the snapshot whose certificate it uses
        self.owner = owner
        self.closed = False
        self.idle_since = time.monotonic()
        loop.watch(tls.fileno(), READ, self._ready)

    def send(self, data: bytes | memoryview) -> bool:
        """Write now or hold back; False when something is held back."""
        if self._held:
            self._held.append(bytes(data))
            if len(self._held) > MAX_HELD:  # a peer that asks (PING) and never reads
                self._loop.after(0, lambda: self.close("the peer does not read what it asked for"))
            return False
        try:
            self._tls.write(data)  # whole or not at all: Python leaves SSL_MODE_ENABLE_PARTIAL_WRITE off
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self.hold(bytes(data))
            return False
        except (OSError, ValueError) as error:
            reason = _text(error)
            self._loop.after(0, lambda: self.close(reason))  # not inside the caller's own step
            return False
        return True

    def hold(self, frame: bytes) -> None:
        """OpenSSL could not write it and wants the same bytes again; it accepts them from another place
        (SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER)."""
        self._held.append(frame)
        self._tell_lane()
        self._want(self._events | WRITE)

    def begin_lane(
        self, app_fd: int, relay: Relay, moved: array[int], costs: array[int], is_source: bool
    ) -> Lane | None:
        """From here on plain DATA passes without us, where the engine runs."""
        if self._lane is not None:
            self._lane.begin(app_fd, relay, self, moved, costs, is_source)
            self._tell_lane()
        return self._lane

    def take(self, data: bytes) -> None:
        """What the engine read and left to us, and then whatever OpenSSL holds."""
        if data and not self.closed:
            self._received(memoryview(data))
        if not self._paused:
            self._read()

    def pause(self) -> None:
        """Read no more: the other side of the relay does not keep up."""
        self._paused = True
        self._want(self._events & ~READ)

    def resume(self) -> None:
        if self._paused and not self.closed:
            self._paused = False
            self._want(self._events | READ)
            if self._waiting():
                self._loop.after(0, self._read)  # bytes inside OpenSSL wake nobody

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self.tunnel.drop()
        self._loop.forget(self._tls.fileno())
        with contextlib.suppress(OSError, ValueError):
            self._tls.close()
        self.owner.closed(self, reason)

    def local_address(self) -> str:
        return str(self._tls.getsockname()[0])

    def rtt_us(self) -> int | None:
        """The kernel's smoothed round-trip time to the other proxy."""
        try:
            info = self._tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:
            return None
        return int(struct.unpack_from("=I", info, TCPI_RTT_AT)[0])

    def _want(self, events: int) -> None:
        if events != self._events and not self.closed:
            self._events = events
            self._loop.change(self._tls.fileno(), events)

    def _ready(self, mask: int) -> None:
        if mask & WRITE and self._held:
            self._flush()
        if mask & ~WRITE:
            self._read()

    def _flush(self) -> None:
        while self._held:
            try:
                self._tls.write(self._held[0])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            except (OSError, ValueError) as error:
                self.close(_text(error))
                return
            self._held.popleft()
        self._tell_lane()
        self._want(self._events & ~WRITE)
        self.owner.drained(self)

    def _read(self) -> None:
        for _ in range(READS_PER_WAKE):
            if self.closed:
                return
            try:
                size = cast(int, self._tls.read(BUFFER_BYTES, self._buffer))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except (OSError, ValueError) as error:
                self.close(_text(error))
                return
            if not size:
                self.close("the peer closed the tunnel")
                return
            self._received(self._view[:size])
            if self._paused or (size < RECORD_BYTES and not self._waiting()):
                return
        if self._waiting() and not self.closed:
            self._loop.after(0, self._read)

    def _received(self, data: memoryview) -> None:
        self.owner.received(self, self.tunnel.receive(data))
        self._tell_lane()

    def _waiting(self) -> bool:
        """Whether OpenSSL holds bytes; of what it read ahead, perhaps only part of a record."""
        return self._lane.waiting() if self._lane is not None else self._tls.pending() > 0

    def _tell_lane(self) -> None:
        if self._lane is not None:
            self._lane.sends = not self._held
            self._lane.receives = _expects_data(self.tunnel)


def _expects_data(tunnel: Tunnel) -> bool:
    """Whether the next byte begins a frame, and DATA is wanted."""
    decoder = tunnel._decoder
    return tunnel._flowing and not decoder._data_left and not decoder.buffered


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or error}"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
