"""/metrics, /healthz, /readyz and /status, on a TCP address for scrapers and a unix socket for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import web

# Any local process can connect here, and each connection takes a descriptor that control needs for policy and keys.
MAX_TCP, MAX_ALL = 64, 128  # the difference is the unix socket's alone
LONGEST_S = 30.0
CONNECTING_S = 1.0

Answers = Callable[[], dict[str, Any]]


class AdminServer:
    """`status` answers {"ready": bool, ...}; `render` the metrics text. Nothing here changes anything."""

    def __init__(self, status: Answers, render: Callable[[], bytes], content_type: str) -> None:
        self._status = status
        self._render = render
        self._content_type = content_type
        self._runner: web.AppRunner | None = None
        self._servers: list[asyncio.Server] = []
        self._handlers: dict[web.RequestHandler, float] = {}  # open or about to be, and since when

    async def start(self, listening: socket.socket, unix_path: str) -> None:
        """OSError when the unix socket cannot be made."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/status", self._show)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._servers = [await loop.create_server(lambda: self._protocol(MAX_TCP), sock=listening)]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unix_path)  # of a control that was killed; the supervisor's lock says that there is no other
        self._servers.append(await loop.create_unix_server(lambda: self._protocol(MAX_ALL), unix_path))

    def _protocol(self, limit: int) -> asyncio.BaseProtocol:
        """For one connection: aiohttp's, or one that closes it because there are too many."""
        assert self._runner is not None
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        # aiohttp's own list lags behind: asyncio accepts a hundred before it tells the first that it is connected.
        fresh = loop.time() - CONNECTING_S
        known = self._handlers.items()
        self._handlers = {one: made for one, made in known if one.transport is not None or made > fresh}
        if len(self._handlers) >= limit:
            return _Refusing()
        handler = self._runner.server()
        self._handlers[handler] = loop.time()
        loop.call_later(LONGEST_S, handler.force_close)  # aiohttp lets a silent one stay for ever
        return handler

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._render(), headers={"Content-Type": self._content_type})

    async def _health(self, _: web.Request) -> web.Response:
        """Alive: the loop answers. Whether it can serve is /readyz."""
        return web.json_response({"ok": True})

    async def _ready(self, _: web.Request) -> web.Response:
        status = self._status()
        return web.json_response(status, status=200 if status["ready"] else 503)

    async def _show(self, _: web.Request) -> web.Response:
        return web.json_response(self._status())


class _Refusing(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
