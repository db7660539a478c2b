"""Accepting: one listening socket shared by all workers, and what to do when descriptors run out."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

from agent.proxy.loop import EXCLUSIVE, READ, Loop
from agent.proxy.reserve import Reserve

BACK_OFF_S = 0.1

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Accepted = Callable[[socket.socket], None]


class Listener:
    """`exhausted` is called once for each refused connection while descriptors are used up."""

    def __init__(self, loop: Loop, sock: socket.socket, accepted: Accepted, exhausted: Callable[[], None]) -> None:
        self._loop = loop
        self._socket = sock
        self._accepted = accepted
        self._exhausted = exhausted
        self._reserve = Reserve()
        self._open = True
        self._watch()

    def close(self) -> None:
        """Stop accepting here; the socket itself is shared and stays with the supervisor."""
        if self._open:
            self._open = False
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._reserve.close()

    def _watch(self) -> None:
        # Exclusive: one connection wakes one worker, not all of them.
        if self._open:
            self._loop.watch(self._socket.fileno(), READ | EXCLUSIVE, self._ready)

    def _ready(self, _mask: int) -> None:
        """One at a time: a worker that took more would take a whole burst, and starve its relays meanwhile."""
        try:
            sock, _address = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # Anything else is an error of the one connection that was to be accepted (accept(2), "Error handling").
            if error.errno in _NO_DESCRIPTOR:
                self._refuse_one()
            return
        sock.setblocking(False)
        self._accepted(sock)
        self._go_last()

    def _go_last(self) -> None:
        """The kernel wakes the first exclusive waiter that sleeps: whoever has just accepted queues up again behind the
        other workers. Without this one of them gets nearly all connections while there are few."""
        if self._open:
            self._loop.forget(self._socket.fileno())
            self._watch()

    def _refuse_one(self) -> None:
        """Give the reserve descriptor up for one accept, so that a waiting client is refused instead of left hanging;
        then pause, because level-triggered epoll would spin."""
        with self._reserve.lent(), contextlib.suppress(OSError):  # another worker took it: then pause only
            self._socket.accept()[0].close()
        self._exhausted()
        self._loop.forget(self._socket.fileno())
        self._loop.after(BACK_OFF_S, self._watch)
