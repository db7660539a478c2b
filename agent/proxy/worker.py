"""A proxy role: with the descriptors it was given and a snapshot it accepts, decides and relays until told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent import channel
from agent.config import Config
from agent.identity import ExeFile, IdentityRule, needs_exe
from agent.outcome import Event, Outcome, Side, socket_text, to_json
from agent.proxy.destination import Destination, reject
from agent.proxy.handshake import Authenticated, Failure, Handshake
from agent.proxy.link import Link
from agent.proxy.listener import Listener
from agent.proxy.loop import READ, Loop
from agent.proxy.pool import Pool
from agent.proxy.relay import abort, end_with_reset
from agent.proxy.reserve import Reserve
from agent.proxy.shared import Shared, SocketFlows
from agent.proxy.source import SourceStream
from agent.proxy.state import State, build
from agent.proxy.who import Who
from agent.snapshot import Snapshot, decode
from agent.tunnel.stream import Role, Tunnel
from policy.model import Reason

log = logging.getLogger("underpass.proxy")

FIRST_SNAPSHOT_LIMIT_S = 3.0
FORGOTTEN_AFTER = 3  # times the idle limit of the opener's pool


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the supervisor hands to a worker."""

    status: socket.socket  # ready, beats; its end means that the supervisor is gone
    orders: socket.socket  # snapshots from control
    who: socket.socket
    outcomes: socket.socket
    captures: tuple[socket.socket, ...]  # listening, one per address family
    tunnels: socket.socket  # listening
    socket_flows: SocketFlows


class Worker:
    def __init__(
        self,
        config: Config,
        rules: tuple[IdentityRule, ...],
        files: Callable[[], dict[str, ExeFile]],
        inherited: Inherited,
    ) -> None:
        self._config = config
        self._rules = rules
        self._files = files
        self._given = inherited
        self._loop = Loop(self._unplanned)
        self._who = Who(self._loop, inherited.who, needs_exe(rules), self._defect)
        self._reserve = Reserve()
        self._snapshot: Snapshot | None = None
        self._shared: Shared | None = None
        self._pool = Pool(self._loop, config.limits.idle_tunnel, self._is_current)
        sockets = (inherited.status, inherited.orders, inherited.who, *inherited.captures, inherited.tunnels)
        self._vital = {sock.fileno() for sock in sockets}
        self._listeners: list[Listener] = []
        self._links: set[Link] = set()
        self._handshakes: set[Handshake] = set()
        self._draining = False
        self._missed = False  # a snapshot that could not be read; control is asked again
        self.lost_outcomes = 0
        self.defects = 0

    def run(self) -> int:
        loop, given = self._loop, self._given
        loop.watch(given.orders.fileno(), READ, lambda _: self._guarded(self._order))
        loop.watch(given.status.fileno(), READ, lambda _: self._guarded(self._status))
        loop.every(1.0, self._beat)
        loop.every(self._config.report_open_every, self._report_open)
        loop.every(1.0, self._ask_again)
        loop.every(max(0.25, self._config.limits.idle_tunnel / 4), self._close_forgotten)
        loop.after(FIRST_SNAPSHOT_LIMIT_S, self._listen_to_captures)
        channel.send(given.orders, {"type": "hello"})
        loop.run()
        return 0

    def drain_soon(self) -> None:
        """For a handler of signals, which may run inside any step: the loop's next turn drains."""
        self._loop.after(0, self.drain)

    def drain(self) -> None:
        """Accept nothing more, let live streams end, leave after the limit."""
        if self._draining:
            return
        self._draining = True
        for listener in self._listeners:
            listener.close()
        self._pool.close()
        for link in list(self._links):
            if not link.closed and not link.tunnel.going_away:
                link.send(link.tunnel.goaway())
        self._loop.after(self._config.limits.drain, self._end)
        self._loop.every(0.05, self._end_when_empty)

    # Messages

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except ConnectionResetError:
            self._loop.forget(self._given.orders.fileno())
            self._loop.forget(self._given.status.fileno())
            self.drain()  # the supervisor is gone; its successor brings its own workers
        except Exception as error:  # noqa: BLE001 - a message that we fail on must not cost us all those after it
            self._defect(error)

    def _status(self) -> None:
        while channel.receive(self._given.status) is not None:
            pass  # nothing is sent this way; only its end matters

    def _order(self) -> None:
        while True:
            with self._reserve.lent():  # a revocation must reach us even when peers hold all our descriptors
                message = channel.receive(self._given.orders)
                if message is None:
                    return
                self._obey(*message)

    def _obey(self, fields: channel.Message, body: bytes | None) -> None:
        if fields.get("type") != "snapshot":
            return
        self._missed = body is None
        if body is not None:
            self._apply(decode(body))

    def _ask_again(self) -> None:
        if self._shared is None or self._missed:
            channel.send(self._given.orders, {"type": "hello"})

    def _apply(self, snapshot: Snapshot) -> None:
        old = self._shared.state if self._shared else None
        try:
            state = build(snapshot, self._config.trust_domain, old, self._snapshot)
        except (ValueError, ssl.SSLError) as error:
            log.error("snapshot %d refused, the one before stays: %s", snapshot.generation, error)
            return
        except OSError as error:
            log.error("snapshot %d cannot be used now and is asked for again: %s", snapshot.generation, error)
            self._missed = True
            return
        self._snapshot = snapshot
        if self._shared is None:
            self._begin(state)
            return
        self._shared.state = state
        for stream in list(self._shared.live):
            try:
                stream.review(state)
            except Exception as error:  # noqa: BLE001 - the others must be reviewed too
                self._defect(error)

    def _begin(self, state: State) -> None:
        given = self._given
        self._shared = Shared(
            self._loop, self._config, self._rules, self._files, given.socket_flows, self._who, self._report, state
        )
        self._listen_to_captures()
        self._listeners.append(Listener(self._loop, given.tunnels, self._tunnelled, self._exhausted))
        self._tell({"type": "ready"})

    # Connections

    def _listen_to_captures(self) -> None:
        """With the first snapshot; without one after a while, to refuse rather than leave applications hanging."""
        if not self._listeners and not self._draining:
            for sock in self._given.captures:
                self._listeners.append(Listener(self._loop, sock, self._captured, self._exhausted))

    def _captured(self, sock: socket.socket) -> None:
        end_with_reset(sock)
        if self._shared is None:
            self._report(refused_without_policy(self._config.host))
            abort(sock)
            return
        try:
            SourceStream(self._shared, self._pool, sock).start()
        except Exception as error:  # noqa: BLE001 - a defect met by one connection must not close the listener
            self._defect(error)
            abort(sock)

    def _tunnelled(self, sock: socket.socket) -> None:
        shared = self._shared
        assert shared is not None
        state = shared.state
        peer = _peer_of(sock)

        def done(result: Authenticated | Failure) -> None:
            if isinstance(result, Failure):
                self._report(reject(shared, f"{result.reason}: {result.detail}", peer))
                return
            local = state.servers.served(result.tls)
            if local is None:
                result.tls.close()
                self._report(reject(shared, "server_name: no identity of this host was named", peer))
                return
            link = Link(
                self._loop, result.tls, Tunnel(Role.ACCEPTOR), local, result.peer, result.info, state.leaf_generation,
                Destination(shared), shared.link_buffer,
            )  # fmt: skip
            self._links.add(link)

        timeout = self._config.limits.handshake_timeout
        try:
            Handshake(self._loop, sock, state.servers.base, self._config.trust_domain, timeout, done)
        except OSError as error:
            sock.close()
            self._report(reject(shared, f"overloaded: {error.strerror}", peer))

    def _exhausted(self) -> None:
        assert self._shared is not None
        self._report(reject(self._shared, "overloaded: no file descriptors left", ""))

    def _is_current(self, link: Link) -> bool:
        return not self._draining and self._shared is not None and link.generation == self._shared.state.leaf_generation

    # Reports

    def _report(self, outcome: Outcome) -> None:
        """Control writes it down. If control is away long enough for the channel to fill, the loss is counted."""
        if not channel.send(self._given.outcomes, {"type": "outcome", "outcome": to_json(outcome)}):
            self.lost_outcomes += 1

    def _report_open(self) -> None:
        self._links = {link for link in self._links if not link.closed}
        if self._shared is not None:
            for stream in list(self._shared.live):
                stream.report_open()

    def _close_forgotten(self) -> None:
        """Tunnels that a peer opened and does not use; its own pool closes them much earlier."""
        oldest = time.monotonic() - FORGOTTEN_AFTER * self._config.limits.idle_tunnel
        for link in list(self._links):
            if isinstance(link.owner, Destination) and link.idle_since < oldest:
                link.close("idle")

    def _unplanned(self, fd: int, error: Exception) -> None:
        """A defect: say where, cut the one connection it happened to, go on with the others."""
        self._defect(error)
        if fd in self._vital:
            self._end()  # deaf from here on; the supervisor starts another, and these sockets are also its
        elif fd >= 0:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                sock.shutdown(socket.SHUT_RDWR)

    def _defect(self, error: Exception) -> None:
        self.defects += 1
        log.error("defect in the proxy, its connection is cut", exc_info=error)

    def _beat(self) -> None:
        engine = "compiled" if self._loop.compiled else "python"
        self._tell({"type": "beat", "lost_outcomes": self.lost_outcomes, "defects": self.defects, "engine": engine})

    def _tell(self, message: channel.Message) -> None:
        channel.send(self._given.status, message)

    def _end_when_empty(self) -> None:
        if self._shared is None or not self._shared.live:
            self._end()

    def _end(self) -> None:
        if self._shared is not None:
            for stream in list(self._shared.live):
                stream.shut("the proxy ends")
        self._loop.stopped = True


def refused_without_policy(host: str) -> Outcome:
    return Outcome(
        event=Event.DENY, time=time.time(), host=host, side=Side.SOURCE, verdict="deny", reason=Reason.NO_POLICY.value
    )  # fmt: skip


def _peer_of(sock: socket.socket) -> str:
    try:
        return socket_text(*sock.getpeername()[:2])
    except OSError:
        return ""  # gone already


def count_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """The ssl module reports a server name that is not ASCII only here; any stranger can send one: one short line."""
    log.warning("refused inside a TLS callback: %s", unraisable.exc_type.__name__)
