"""The source's side of one stream: an accepted, captured connection becomes a stream to the destination's proxy.

The steps, in order: the flow (who dialled what), the identity, the decision, the tunnel, OPEN ... OPENED, the relay.
Whatever fails, the application's connection is reset and one outcome says why.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from ipaddress import ip_address

from agent.identity import Caller, Unidentified, identify
from agent.outcome import Event, Side, socket_text
from agent.proxy.handshake import Authenticated, Failure, Handshake, dial
from agent.proxy.link import Link
from agent.proxy.loop import Timer
from agent.proxy.pool import Key, Pool
from agent.proxy.relay import Relay, abort
from agent.proxy.shared import Draft, Shared
from agent.proxy.state import State
from agent.records import Flow, unpack_flow
from agent.route import NoRoute, Route
from agent.tunnel import events as ev
from agent.tunnel.events import Events
from agent.tunnel.frames import ResetReason
from agent.tunnel.opening import Opening
from agent.tunnel.stream import Role, Tunnel
from policy.evaluate import decide
from policy.identity import SpiffeId
from policy.model import Decision, Request, Verdict

ANSWER_GRACE_S = 2.0  # the destination's own connect time-out comes first, so that its reason reaches us


class SourceStream:
    """Owner of a tunnel while it opens; `start` does the rest."""

    def __init__(self, shared: Shared, pool: Pool, app: socket.socket) -> None:
        self._shared = shared
        self._pool = pool
        self._app = app
        self._draft = Draft(shared.config.host, Side.SOURCE)
        self._flow: Flow | None = None
        self._identity: SpiffeId | None = None
        self._route: Route | None = None
        self._id = os.urandom(16)
        self._relay: Relay | None = None
        self._timer: Timer | None = None
        self._link_was_warm = False
        self._done = False

    def start(self) -> None:
        raw = self._shared.socket_flows.lookup(self._app.fileno().to_bytes(4, "little"))
        if raw is None:
            # Somebody outside the governed cgroups dialled the capture port itself, or the kernel lost the entry.
            self._refuse("no_flow")
            return
        self._flow = flow = unpack_flow(raw)
        self._draft.connection = self._id.hex()
        self._draft.server = socket_text(flow.original, flow.original_port)
        self._draft.pid, self._draft.uid = flow.pid, flow.uid
        self._shared.who.ask(flow, self._known)

    def _known(self, caller: Caller | None) -> None:
        try:
            self._judge(caller)
        except Exception:  # told by whoever called; but nobody else would ever end this connection
            self.shut("defect in the proxy")
            raise

    def _judge(self, caller: Caller | None) -> None:
        shared, flow = self._shared, self._flow
        assert flow is not None
        route = shared.state.routes.to(flow.original, flow.original_port)
        if isinstance(route, NoRoute):
            self._refuse("no_route")
            return
        identity: SpiffeId | Unidentified = Unidentified("caller unknown")
        if caller is not None:
            identity = identify(shared.rules, caller, shared.config.host, shared.config.trust_domain, shared.files())
        self._route = route
        self._identity = identity if isinstance(identity, SpiffeId) else None
        self._draft.source = self._identity.uri if self._identity else ""
        self._draft.destination, self._draft.service = route.destination.uri, route.service.name
        shared.live.add(self)  # before the decision: a policy that changes from now on reviews it
        decision = self._decide(shared.state)
        self._note(decision)
        if decision.verdict is Verdict.DENY:
            self._refuse(decision.reason.value)
        else:
            self._find_link(fresh=False)

    def _decide(self, state: State) -> Decision:
        flow, route = self._flow, self._route
        assert flow is not None
        assert route is not None
        request = Request(self._identity, route.destination, route.service.name, flow.original_port)
        return decide(state.policy, self._shared.config.trust_domain, request)

    def _note(self, decision: Decision) -> None:
        self._draft.verdict, self._draft.rule = decision.verdict.value, decision.rule
        self._draft.reason = decision.reason.value

    # The tunnel

    def _key(self) -> Key:
        assert self._identity is not None
        assert self._route is not None
        return Key(self._identity, self._route.destination, self._route.tunnel)

    def _find_link(self, fresh: bool) -> None:
        link = None if fresh else self._pool.take(self._key())
        self._link_was_warm = link is not None
        if link is not None:
            self._open(link)
            return
        key, limits = self._key(), self._shared.config.limits
        context = self._shared.state.clients.get(key.source)
        if context is None:
            self._fail("no_certificate")
            return
        try:
            sock = dial((str(key.tunnel[0]), key.tunnel[1]))
        except OSError as error:
            self._fail(f"unreachable: {error.strerror}")
            return
        timeout = limits.connect_timeout + limits.handshake_timeout
        generation = self._shared.state.leaf_generation
        Handshake(
            self._shared.loop, sock, context, key.source.trust_domain, timeout,
            lambda result: self._shaken(result, generation), key.destination.server_name,
        )  # fmt: skip

    def _shaken(self, result: Authenticated | Failure, generation: int) -> None:
        if isinstance(result, Failure):
            self._fail(f"{result.reason}: {result.detail}")
            return
        key = self._key()
        if result.peer != key.destination:
            result.tls.close()
            self._fail(f"wrong_peer: {result.peer.uri} answered")
            return
        link = Link(
            self._shared.loop, result.tls, Tunnel(Role.OPENER), key.source, result.peer, result.info, generation, self,
            self._shared.link_buffer,
        )  # fmt: skip
        if self._done:
            self._pool.give(key, link)
        else:
            self._open(link)

    def _open(self, link: Link) -> None:
        flow, route, identity = self._flow, self._route, self._identity
        assert flow is not None
        assert route is not None
        assert identity is not None
        link.owner = self
        self._draft.link, self._draft.tls = link, link.tls_info
        source = flow.source if flow.source is not None else ip_address(link.local_address())
        self._draft.client = socket_text(source, flow.source_port)
        opening = Opening(
            connection_id=self._id,
            source=(source, flow.source_port),
            destination=(flow.original, flow.original_port),
            identity=identity,
            service=route.service.name,
            traceparent=f"00-{self._id.hex()}-{os.urandom(8).hex()}-01",
            hops=0,
        )
        limit = self._shared.config.limits.connect_timeout + ANSWER_GRACE_S
        self._timer = self._shared.loop.after(limit, lambda: link.close("no answer to OPEN"))
        link.send(link.tunnel.open(opening))

    # While the tunnel opens

    def received(self, link: Link, events: Events) -> None:
        for at, event in enumerate(events):
            if event[0] == ev.OPENED:
                self._carry(link, events[at + 1 :])
                return
            if event[0] == ev.REFUSED:
                self._stop_timer()
                self._draft.link = None
                self._pool.give(self._key(), link)
                if events[at + 1 :] and not link.closed:  # one may be a violation: that tunnel must not be used again
                    link.owner.received(link, events[at + 1 :])
                self._fail(f"refused by the destination: {event[1].reason.name.lower()} {event[1].text}".rstrip())
                return
            if event[0] == ev.PING:
                link.send(link.tunnel.pong(event[1]))
            if event[0] == ev.VIOLATION:
                link.close(f"protocol violation: {event[1]}")
                return

    def drained(self, link: Link) -> None:
        pass

    def closed(self, link: Link, reason: str) -> None:
        self._stop_timer()
        self._draft.link = None
        if self._done:
            return
        if self._link_was_warm:
            self._find_link(fresh=True)  # it may have died while idle; nothing was carried, so once more is safe
        else:
            self._fail(f"tunnel lost: {reason}")

    def _carry(self, link: Link, rest: Events) -> None:
        self._stop_timer()
        flow = self._flow
        assert flow is not None
        self._draft.connect_ms = round((time.clock_gettime_ns(time.CLOCK_BOOTTIME) - flow.started_ns) / 1e6, 3)
        self._app.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        relay = Relay(self._shared.loop, self._app, link, self._shared.app_buffer, True, self._released, self._finished)
        self._relay = self._draft.relay = relay
        if rest:
            relay.received(link, rest)

    def _released(self, link: Link, rest: Sequence[ev.Event]) -> None:
        if not link.closed:
            self._draft.rtt_us = link.rtt_us()
            self._pool.give(self._key(), link)
            if rest:
                link.owner.received(link, rest)
        self._draft.link = None

    def _finished(self, close_reason: str) -> None:
        self._end(Event.CLOSE, close_reason)

    # From outside

    def report_open(self) -> None:
        if self._relay is not None:
            self._shared.report(self._draft.outcome(Event.OPEN))

    def review(self, state: State) -> None:
        decision = self._decide(state)
        if decision.verdict is Verdict.DENY:
            self._note(decision)
            self._cut(ResetReason.REVOKED, "revoked by policy")

    def shut(self, reason: str) -> None:
        self._cut(ResetReason.SHUTDOWN, reason)

    def _cut(self, reason: ResetReason, close_reason: str) -> None:
        if self._relay is not None:
            self._relay.reset(reason, close_reason)
            return
        self._fail(close_reason)
        if self._draft.link is not None:
            self._draft.link.close(close_reason)  # OPEN cannot be taken back

    # Endings

    def _refuse(self, reason: str) -> None:
        """Policy or state says no, before any tunnel."""
        self._draft.verdict = "deny"
        self._draft.reason = reason
        abort(self._app)
        self._end(Event.DENY, "")

    def _fail(self, why: str) -> None:
        """Allowed, but the destination could not be reached."""
        abort(self._app)
        self._end(Event.CLOSE, why)

    def _end(self, event: Event, close_reason: str) -> None:
        if self._done:
            return
        self._done = True
        self._shared.live.discard(self)
        self._shared.report(self._draft.outcome(event, close_reason))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
