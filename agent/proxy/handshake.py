"""From a TCP connection to a link: TLS handshake under a deadline, then whose chain it is."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from agent.certs import contexts
from agent.certs.verify import Refusal, verify_peer
from agent.outcome import Tls
from agent.proxy.loop import READ, WRITE, Loop
from policy.identity import SpiffeId

KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


@dataclass(frozen=True, slots=True)
class Failure:
    """`reason` is a metric label, `detail` a line for people."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Authenticated:
    tls: ssl.SSLSocket
    peer: SpiffeId
    info: Tls


Done = Callable[[Authenticated | Failure], None]


def dial(address: tuple[str, int], prepare: Callable[[socket.socket], None] | None = None) -> socket.socket:
    """Begin a TCP connection; the socket becomes writable when it is decided. OSError when it cannot even begin.
    `prepare` gets the socket before connect()."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if prepare is not None:
            prepare(sock)
        number = sock.connect_ex(address)
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, os.strerror(number))
    except OSError:
        sock.close()
        raise
    return sock


class Handshake:
    """Drives one socket to Authenticated or Failure, and tells once. It holds nobody up: each step is one wake-up."""

    def __init__(
        self, loop: Loop, sock: socket.socket, context: ssl.SSLContext, trust_domain: str, timeout: float, done: Done,
        server_name: str | None = None,
    ) -> None:  # fmt: skip
        """`server_name` makes it the client's side, and the socket may still be connecting."""
        self._loop = loop
        self._socket = sock
        self._context = context
        self._trust_domain = trust_domain
        self._done = done
        self._server_name = server_name
        self._tls: ssl.SSLSocket | None = None
        self._fd = sock.fileno()  # kept, because a wrapping that fails closes the socket itself
        self._ended = False
        self._timer = loop.after(timeout, lambda: self._fail("timeout", f"no handshake within {timeout:g} s"))
        loop.watch(sock.fileno(), READ if server_name is None else WRITE, self._ready)

    def abandon(self, detail: str) -> None:
        self._fail("abandoned", detail)

    def _ready(self, _mask: int) -> None:
        try:
            if self._tls is None:
                self._wrap()
            self._step()
        except ssl.SSLWantReadError:
            self._loop.change(self._socket.fileno(), READ)
        except ssl.SSLWantWriteError:
            self._loop.change(self._socket.fileno(), WRITE)
        except ssl.SSLCertVerificationError as error:
            self._fail("certificate", error.verify_message)
        except ssl.SSLError as error:
            self._fail("tls", error.reason or str(error))
        except ConnectionRefusedError as error:
            self._fail("unreachable", str(error.strerror))
        except OSError as error:
            self._fail("connection", error.strerror or str(error))

    def _wrap(self) -> None:
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        fd = self._socket.fileno()
        server_side = self._server_name is None
        self._tls = contexts.wrap(self._context, self._socket, server_side, self._server_name)
        self._socket = self._tls  # wrapping detaches the old object and keeps the descriptor
        assert fd == self._socket.fileno()

    def _step(self) -> None:
        tls = self._tls
        assert tls is not None
        tls.do_handshake()
        if not contexts.speaks_underpass(tls):
            self._fail("alpn", "the peer does not speak underpass/1")
            return
        peer = verify_peer(contexts.verified_chain(tls), self._trust_domain)
        if isinstance(peer, Refusal):
            self._fail(peer.reason.value, peer.detail)
            return
        self._timer.cancel()
        self._ended = True
        self._loop.forget(tls.fileno())
        cipher = tls.cipher()
        certificate = tls.getpeercert() or {}
        info = Tls(tls.version() or "", cipher[0] if cipher else "", str(certificate.get("serialNumber", "")))
        self._done(Authenticated(tls, peer, info))

    def _fail(self, reason: str, detail: str) -> None:
        self._timer.cancel()
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(OSError):
            self._loop.forget(self._fd)
        self._socket.close()
        self._done(Failure(reason, detail))
