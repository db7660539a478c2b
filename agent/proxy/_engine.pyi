"""What _engine.c offers."""

import ssl
from array import array
from collections.abc import Callable
from typing import Any

from agent.proxy.link import Link
from agent.proxy.relay import Relay

OPENSSL: str

class Lane:
    """One TLS connection, and while a stream lasts the application's socket beside it. Between `begin` and `end` whole
    DATA frames pass without Python; a flag that is false gives that side's events back to it."""

    app_in: bool  # the application may be read
    app_out: bool  # nothing is held back for the application
    sends: bool  # nothing is held back for the tunnel
    receives: bool  # what comes next from the tunnel begins a frame, and DATA is legal
    def begin(
        self, app_fd: int, relay: Relay, link: Link, moved: array[int], costs: array[int], is_source: bool, /
    ) -> None:
        """Until `end`, `moved` counts bytes from and to the application and `costs` is AddedLatency.cells."""

    def end(self) -> None:
        """Fine when no stream is carried."""

    def waiting(self) -> bool:
        """Whether OpenSSL holds bytes, part of a record perhaps, of which epoll says nothing."""

class Engine:
    woke_ns: int

    def __new__(cls, epoll: int, bounds_us: tuple[int, ...], /) -> Engine: ...
    def lane(self, sock: ssl.SSLSocket, tls: Any, fd: int, /) -> Lane:
        """`tls` is the socket's `_sslobj`. ValueError when it is not what this module knows how to read."""

    def forget(self, fd: int, /) -> None:
        """End the lane that has this descriptor, if one has."""

    def wait(self, seconds: float, /) -> list[tuple[int, Callable[[Any], None] | None, Any]]:
        """(descriptor, None, mask) for what its handler has to do; (descriptor, task, detail): call task(detail)."""
