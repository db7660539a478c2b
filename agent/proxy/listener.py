"""Accepting: one listening socket shared by all workers, and what to do when descriptors run out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable

from agent.proxy.loop import EXCLUSIVE, READ, Loop

ACCEPTS_PER_WAKE = 64  # bounded, so that a connect storm cannot starve the relays of this worker
BACK_OFF_S = 0.1

Accepted = Callable[[socket.socket], None]


class Listener:
    """`exhausted` is called once for each refused connection while descriptors are used up."""

    def __init__(self, loop: Loop, sock: socket.socket, accepted: Accepted, exhausted: Callable[[], None]) -> None:
        self._loop = loop
        self._socket = sock
        self._accepted = accepted
        self._exhausted = exhausted
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._open = True
        self._watch()

    def close(self) -> None:
        """Stop accepting here; the socket itself is shared and stays with the supervisor."""
        if self._open:
            self._open = False
            self._loop.forget(self._socket.fileno())
            self._socket.close()

    def _watch(self) -> None:
        # Exclusive: one connection wakes one worker, not all of them.
        if self._open:
            self._loop.watch(self._socket.fileno(), READ | EXCLUSIVE, self._ready)

    def _ready(self, _mask: int) -> None:
        for _ in range(ACCEPTS_PER_WAKE):
            try:
                sock, _address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._refuse_one()
                return
            sock.setblocking(False)
            self._accepted(sock)

    def _refuse_one(self) -> None:
        """Give the reserve descriptor up for one accept, so that a waiting client is refused instead of left hanging;
        then pause, because level-triggered epoll would spin."""
        os.close(self._reserve)
        with contextlib.suppress(OSError):  # another worker took it, or the reserve went elsewhere: then pause only
            self._socket.accept()[0].close()
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._exhausted()
        self._loop.forget(self._socket.fileno())
        self._loop.after(BACK_OFF_S, self._watch)
