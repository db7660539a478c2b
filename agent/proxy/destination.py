"""The destination's side of a tunnel: each OPEN is judged again, the application dialled, the bytes relayed.

This decision is the one that counts: nothing the other host says is taken for true but what its certificate proves.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address

from agent.identity import Caller, identify
from agent.outcome import Event, Outcome, Side, socket_text
from agent.proxy.handshake import dial
from agent.proxy.link import Link
from agent.proxy.loop import WRITE, Timer
from agent.proxy.relay import Relay, abort
from agent.proxy.shared import Draft, Shared
from agent.proxy.state import State
from agent.records import delivered
from agent.route import NoRoute, Route
from agent.tunnel import events as ev
from agent.tunnel.events import Events
from agent.tunnel.frames import Refusal, RefusedReason, ResetReason
from agent.tunnel.opening import Opening
from policy.evaluate import decide
from policy.model import Decision, Request, Verdict

_BROADCAST = IPv4Address("255.255.255.255")
MAX_BAD_OPENS = 8  # on one tunnel: a few tell the other operator why, more are a flood of audit lines
MAX_HOPS = 3  # more proxies than any honest path has: a loop


class Destination:
    """Owner of an accepted tunnel between streams; makes a stream of each OPEN."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._stream: DestinationStream | None = None
        self._bad_opens = 0

    def received(self, link: Link, events: Events) -> None:
        for at, event in enumerate(events):
            if event[0] == ev.OPEN:
                self._stream = DestinationStream(self._shared, self, link, event[1])
                self._stream.start(events[at + 1 :])
                return
            if event[0] == ev.MUST_REFUSE:
                link.send(link.tunnel.refused(event[1]))
                self._shared.report(reject(self._shared, f"bad_open: {event[1].text}", str(link.peer.uri)))
                self._bad_opens += 1
                if self._bad_opens >= MAX_BAD_OPENS:
                    link.close("too many bad opens")
                    return
            elif event[0] == ev.PING:
                link.send(link.tunnel.pong(event[1]))
            elif event[0] == ev.VIOLATION:
                self._shared.report(reject(self._shared, f"violation: {event[1]}", str(link.peer.uri)))
                link.close(event[1])
                return

    def drained(self, link: Link) -> None:
        pass

    def closed(self, link: Link, reason: str) -> None:
        pass

    def resumed(self, link: Link, rest: Sequence[ev.Event]) -> None:
        """A stream has ended; the tunnel waits for the next one."""
        self._stream = None
        if link.closed:
            return
        link.owner = self
        link.idle_since = time.monotonic()
        link.resume()
        if rest:
            self.received(link, rest)


class DestinationStream:
    """One stream: owner of the tunnel from OPEN until the relay takes over."""

    def __init__(self, shared: Shared, parent: Destination, link: Link, opening: Opening) -> None:
        self._shared = shared
        self._parent = parent
        self._link = link
        self._opening = opening
        self._route: Route | None = None
        self._app: socket.socket | None = None
        self._timer: Timer | None = None
        self._relay: Relay | None = None
        self._done = False
        self._draft = Draft(
            shared.config.host, Side.DESTINATION, connection=opening.connection_id.hex(), source=link.peer.uri,
            destination=link.local.uri, service=opening.service, client=socket_text(*opening.source),
            server=socket_text(*opening.destination), tls=link.tls_info, link=link,
        )  # fmt: skip

    def start(self, rest: Sequence[ev.Event]) -> None:
        self._link.owner = self
        self._shared.live.add(self)  # before the decision: a policy that changes from now on reviews it
        refusal = self._judge()
        if refusal is not None:
            self._refuse(refusal, Event.DENY)
        else:
            self._find_listener()
        if rest and not self._link.closed:
            self._link.owner.received(self._link, rest)

    def _judge(self) -> Refusal | None:
        """Everything OPEN claims, compared with what is proven or configured here."""
        opening, link = self._opening, self._link
        if opening.identity != link.peer:
            return self._deny(RefusedReason.NO_IDENTITY, "the source identity is not the certificate's")
        if opening.hops > MAX_HOPS:
            return self._deny(RefusedReason.LOOP, f"{opening.hops} proxies passed")
        route = self._shared.state.routes.here(link.local, opening.service, *opening.destination)
        if isinstance(route, NoRoute):
            return self._deny(RefusedReason.WRONG_DESTINATION, route.reason)
        self._route = route
        problem = self._client_problem(route)
        if problem:
            return self._deny(RefusedReason.NO_IDENTITY, problem)
        decision = self._decide(self._shared.state)
        self._note(decision)
        if decision.verdict is Verdict.DENY:
            # The rule's name stays here: the source learns that it was denied, not how our policy is built.
            return Refusal(RefusedReason.DENIED)
        return None

    def _client_problem(self, route: Route) -> str:
        """The application will see the client's address and may trust it, so a host cannot name any it likes: none that
        exists inside every host only, and none that is another host's. The rest is the word of a proven host."""
        client, link = self._opening.source[0], self._link
        inside = client.is_loopback and not ip_address(link.local_address()).is_loopback
        if inside or client.is_unspecified or client.is_multicast or client.is_link_local or client == _BROADCAST:
            return f"client address {client} is none that a host has toward others"
        owners = self._shared.state.routes.hosts_of(client)
        if owners and link.peer.host not in owners:
            return f"client address {client} is one of host {min(owners)}"
        if client.version > route.endpoint.address.version:
            # The kernel could not show it: the application would see us, at an address of its own host.
            return f"client address {client} cannot be shown to a server on IPv4"
        return ""

    def _deny(self, reason: RefusedReason, text: str) -> Refusal:
        self._draft.verdict, self._draft.reason = "deny", f"{reason.name.lower()}: {text}"
        return Refusal(reason, 0, text)

    def _decide(self, state: State) -> Decision:
        request = Request(self._link.peer, self._link.local, self._opening.service, self._opening.destination[1])
        return decide(state.policy, self._shared.config.trust_domain, request)

    def _note(self, decision: Decision) -> None:
        self._draft.verdict, self._draft.rule = decision.verdict.value, decision.rule
        self._draft.reason = decision.reason.value

    # Dialling the application

    def _where(self) -> tuple[str, int]:
        assert self._route is not None
        endpoint = self._route.endpoint
        return str(endpoint.address), endpoint.port or self._opening.destination[1]

    def _find_listener(self) -> None:
        """The source asked for an identity, not for an address: whoever holds the port must have it. Else any process
        that gets hold of the port while the application is down would be served its traffic."""
        if self._shared.config.check_listeners:
            self._shared.who.ask_listener(*self._where(), self._listener_known)
        else:
            self._dial()

    def _listener_known(self, owners: list[Caller] | None) -> None:
        if self._done:
            return
        try:
            self._judge_listener(owners)
        except Exception:  # told by whoever called; but nobody else would ever answer this OPEN
            self.shut("defect in the proxy")
            raise

    def _judge_listener(self, owners: list[Caller] | None) -> None:
        if owners == []:
            self._dial_failed(errno.ECONNREFUSED)
            return
        shared = self._shared
        names = [
            identify(shared.rules, owner, shared.config.host, shared.config.trust_domain, shared.files())
            for owner in owners or []
        ]
        if owners is None or any(name != self._link.local for name in names):
            text = "who listens is not known" if owners is None else "another application listens there"
            self._refuse(self._deny(RefusedReason.WRONG_DESTINATION, text), Event.DENY)
        else:
            self._dial()

    def _dial(self) -> None:
        try:
            self._app = app = self._noted_socket(*self._where())
        except OSError as error:
            self._dial_failed(error.errno or errno.EIO)
            return
        limit = self._shared.config.limits.connect_timeout
        self._timer = self._shared.loop.after(limit, lambda: self._dial_failed(errno.ETIMEDOUT))
        self._shared.loop.watch(app.fileno(), WRITE, self._dialled)

    def _noted_socket(self, address: str, port: int) -> socket.socket:
        """The note must be on the socket before connect(): sockops publishes it with the SYN, and the application's
        accept() then answers the client's own address. Without the note the connection would be attributed to us."""

        def note(sock: socket.socket) -> None:
            value = delivered(*self._opening.source, *self._opening.destination)
            self._shared.socket_flows.update(sock.fileno().to_bytes(4, "little"), value)

        return dial((address, port), prepare=note)

    def _dialled(self, _mask: int) -> None:
        app = self._app
        assert app is not None
        number = app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._shared.loop.forget(app.fileno())
        if number:
            self._dial_failed(number)
            return
        self._stop_timer()
        self._draft.connect_ms = round((time.monotonic() - self._draft.started) * 1000, 3)
        app.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link.send(self._link.tunnel.opened())
        self._relay = self._draft.relay = Relay(
            self._shared.loop, app, self._link, self._shared.app_buffer, False, self._released, self._finished
        )

    def _dial_failed(self, number: int) -> None:
        reasons = {errno.ECONNREFUSED: RefusedReason.CONNECT_REFUSED, errno.ETIMEDOUT: RefusedReason.CONNECT_TIMEOUT}
        self._drop_app()
        refusal = Refusal(reasons.get(number, RefusedReason.CONNECT_FAILED), number, os.strerror(number))
        self._refuse(refusal, Event.CLOSE)

    def _refuse(self, refusal: Refusal, event: Event) -> None:
        self._link.send(self._link.tunnel.refused(refusal))
        self._end(event, f"{refusal.reason.name.lower()} {refusal.text}".rstrip())
        self._parent.resumed(self._link, ())

    # Owner of the tunnel while dialling

    def received(self, link: Link, events: Events) -> None:
        for event in events:
            if event[0] == ev.PING:
                link.send(link.tunnel.pong(event[1]))
            elif event[0] == ev.VIOLATION:
                link.close(f"protocol violation: {event[1]}")
                return

    def drained(self, link: Link) -> None:
        pass

    def closed(self, link: Link, reason: str) -> None:
        self._drop_app()
        self._end(Event.CLOSE, f"tunnel lost: {reason}")

    # Endings

    def _released(self, link: Link, rest: Sequence[ev.Event]) -> None:
        if not link.closed:
            self._draft.rtt_us = link.rtt_us()
        self._draft.link = None
        self._parent.resumed(link, rest)

    def _finished(self, close_reason: str) -> None:
        self._end(Event.CLOSE, close_reason)

    def _drop_app(self) -> None:
        self._stop_timer()
        if self._app is not None and self._app.fileno() >= 0:
            self._shared.loop.forget(self._app.fileno())
            abort(self._app)  # it may have been accepted already, and must not look like an orderly end

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, event: Event, close_reason: str) -> None:
        if self._done:
            return
        self._done = True
        self._shared.live.discard(self)
        self._shared.report(self._draft.outcome(event, close_reason))

    # From outside

    def report_open(self) -> None:
        if self._relay is not None:
            self._shared.report(self._draft.outcome(Event.OPEN))

    def review(self, state: State) -> None:
        decision = self._decide(state)
        if decision.verdict is Verdict.ALLOW:
            return
        self._note(decision)
        if self._relay is not None:
            self._relay.reset(ResetReason.REVOKED, "revoked by policy")
        else:
            self._drop_app()
            self._refuse(Refusal(RefusedReason.DENIED), Event.DENY)

    def shut(self, reason: str) -> None:
        if self._relay is not None:
            self._relay.reset(ResetReason.SHUTDOWN, reason)
        else:
            self._drop_app()
            self._refuse(Refusal(RefusedReason.DRAINING), Event.CLOSE)


def reject(shared: Shared, reason: str, peer: str) -> Outcome:
    """A peer on the tunnel port that never became a stream."""
    return Outcome(
        event=Event.REJECT, time=time.time(), host=shared.config.host, side=Side.DESTINATION, verdict="deny",
        reason=reason, client=peer,
    )  # fmt: skip
