"""Whether the compiled inner loop runs here. Any doubt is a no: then the same is done in Python."""

from __future__ import annotations

import logging
import os
import ssl
import sys
from typing import TYPE_CHECKING, Any

from agent.proxy.latency import BOUNDS_US

if TYPE_CHECKING:
    from agent.proxy._engine import Engine, Lane

log = logging.getLogger("underpass.proxy")

OFF = "UNDERPASS_ENGINE"  # environment: `python` leaves the compiled loop out
KNOWN = ((3, 11), (3, 12), (3, 13))  # CPython versions whose private TLS object was read; see _engine.c


def make(epoll_fd: int) -> Engine | None:
    reason = _objection()
    if reason:
        log.info("bytes are carried in Python: %s", reason)
        return None
    from agent.proxy import _engine

    log.info("bytes are carried by the compiled engine, %s", _engine.OPENSSL)
    return _engine.Engine(epoll_fd, BOUNDS_US)


def lane(engine: Engine | None, tls: ssl.SSLSocket) -> Lane | None:
    """None: this connection is read and written in Python."""
    if engine is None:
        return None
    inner: Any = getattr(tls, "_sslobj", None)
    try:
        return engine.lane(tls, inner, tls.fileno())
    except ValueError as error:
        log.warning("bytes of one tunnel are carried in Python: %s", error)
        return None


def _objection() -> str:
    if os.environ.get(OFF) == "python":
        return f"{OFF} says so"
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in KNOWN:
        return f"the engine does not know {sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        from agent.proxy import _engine
    except ImportError as error:
        return f"the engine is not built ({error})"
    if _engine.OPENSSL != ssl.OPENSSL_VERSION:
        return f"Python has {ssl.OPENSSL_VERSION}, the engine {_engine.OPENSSL}"
    return ""
