"""Warm tunnels between two identities, never shared across them: a connection then costs no handshake."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from agent.proxy.link import Link
from agent.proxy.loop import Loop
from agent.tunnel import events as ev
from agent.tunnel.events import Events
from policy.fields import SocketAddress
from policy.identity import SpiffeId

MAX_IDLE_PER_KEY = 64


@dataclass(frozen=True, slots=True)
class Key:
    """Who speaks to whom, and where: the whole of what a tunnel's handshake has proven."""

    source: SpiffeId
    destination: SpiffeId
    tunnel: SocketAddress


class Pool:
    """Owns tunnels while they carry no stream."""

    def __init__(self, loop: Loop, idle_limit: float, is_current: Callable[[Link], bool]) -> None:
        self._idle: dict[Key, list[Link]] = defaultdict(list)
        self._keys: dict[Link, Key] = {}
        self._idle_limit = idle_limit
        self._is_current = is_current
        loop.every(max(0.25, idle_limit / 4), self.sweep)

    def take(self, key: Key) -> Link | None:
        """The tunnel used last, because it is the least likely to have died unseen."""
        links = self._idle.get(key)
        if not links:
            return None
        link = links.pop()
        del self._keys[link]
        return link

    def give(self, key: Key, link: Link) -> None:
        """A tunnel whose stream has ended. It is closed if it must not be used again."""
        link.owner = self
        link.resume()
        if link.closed:
            return
        if link.tunnel.going_away or not self._is_current(link) or len(self._idle[key]) >= MAX_IDLE_PER_KEY:
            link.close("not needed any more")
            return
        link.idle_since = time.monotonic()
        self._idle[key].append(link)
        self._keys[link] = key

    def sweep(self) -> None:
        """Close what was idle too long or was made with a certificate since replaced."""
        oldest = time.monotonic() - self._idle_limit
        for link in list(self._keys):
            if link.idle_since < oldest or not self._is_current(link):
                link.close("idle")

    def close(self) -> None:
        for link in list(self._keys):
            link.close("draining")

    def idle_count(self) -> int:
        return len(self._keys)

    def received(self, link: Link, events: Events) -> None:
        for event in events:
            if event[0] == ev.PING:
                link.send(link.tunnel.pong(event[1]))
            elif event[0] in (ev.GOAWAY, ev.VIOLATION):
                link.close("the peer goes away")
                return

    def drained(self, link: Link) -> None:
        pass

    def closed(self, link: Link, reason: str) -> None:
        del reason  # an idle tunnel that ends costs nobody anything
        key = self._keys.pop(link, None)
        if key is not None:
            self._idle[key].remove(link)
            if not self._idle[key]:
                del self._idle[key]
