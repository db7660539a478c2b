"""What all streams of one worker share, and the draft of each stream's one record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from agent.config import Config
from agent.identity import ExeFile, IdentityRule
from agent.outcome import Event, Outcome, Side, Tls
from agent.proxy.link import BUFFER_BYTES, Link
from agent.proxy.loop import Loop
from agent.proxy.relay import Relay
from agent.proxy.state import State
from agent.proxy.who import Who
from agent.tunnel.frames import HEADER_BYTES


class Stream(Protocol):
    """A stream that lives: what the worker asks of it from outside."""

    def report_open(self) -> None: ...

    def review(self, state: State) -> None:
        """Decide again under a new policy; cut the stream if it is not allowed any more."""

    def shut(self, reason: str) -> None:
        """Cut the stream: the worker ends."""


class SocketFlows(Protocol):
    """The sk_storage map `socket_flows` of bpf/maps.h: keys are our own descriptors, values struct flow."""

    def lookup(self, key: bytes) -> bytes | None: ...

    def update(self, key: bytes, value: bytes) -> None: ...


@dataclass(slots=True)
class Shared:
    """One read buffer per direction: nothing stays in them between
    two calls, so thousands of idle connections cost none."""

    loop: Loop
    config: Config
    rules: tuple[IdentityRule, ...]
    files: Callable[[], dict[str, ExeFile]]  # what is now at the rules' executable paths
    socket_flows: SocketFlows
    who: Who
    report: Callable[[Outcome], None]
    state: State
    live: set[Stream] = field(default_factory=set)
    app_buffer: bytearray = field(default_factory=lambda: bytearray(HEADER_BYTES + BUFFER_BYTES))
    link_buffer: bytearray = field(default_factory=lambda: bytearray(BUFFER_BYTES))


@dataclass(slots=True)
class Draft:
    """What is known of a stream so far; `outcome` makes the record of it."""

    host: str
    side: Side
    started: float = field(default_factory=time.monotonic)
    connection: str = ""
    source: str = ""
    destination: str = ""
    service: str = ""
    verdict: str = ""
    rule: str = ""
    reason: str = ""
    client: str = ""
    server: str = ""
    tls: Tls | None = None
    connect_ms: float | None = None
    pid: int | None = None
    uid: int | None = None
    link: Link | None = None
    relay: Relay | None = None
    rtt_us: int | None = None

    def outcome(self, event: Event, close_reason: str = "") -> Outcome:
        relay = self.relay
        sent, received = (relay.from_app, relay.to_app) if relay else (0, 0)
        if self.side is Side.DESTINATION:
            sent, received = received, sent  # there the application's own bytes are the answers
        if self.link is not None and not self.link.closed:
            self.rtt_us = self.link.rtt_us()
        return Outcome(
            event=event,
            time=time.time(),
            host=self.host,
            side=self.side,
            connection=self.connection,
            source=self.source,
            destination=self.destination,
            service=self.service,
            verdict=self.verdict,
            rule=self.rule,
            reason=self.reason,
            client=self.client,
            server=self.server,
            tls=self.tls,
            bytes_sent=sent,
            bytes_received=received,
            connect_ms=self.connect_ms,
            duration_ms=round((time.monotonic() - self.started) * 1000, 3),
            added_ms=relay.latency.percentiles() if relay else None,
            rtt_us=self.rtt_us,
            close_reason=close_reason,
            pid=self.pid,
            uid=self.uid,
        )
