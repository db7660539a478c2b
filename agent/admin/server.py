"""/metrics, /healthz, /readyz and /status, on a TCP address for scrapers and a unix socket for the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from aiohttp import web

Answers = Callable[[], dict[str, Any]]


class AdminServer:
    """`status` answers {"ready": bool, ...}; `render` the metrics text. Nothing here changes anything."""

    def __init__(self, status: Answers, render: Callable[[], bytes], content_type: str) -> None:
        self._status = status
        self._render = render
        self._content_type = content_type
        self._runner: web.AppRunner | None = None

    async def start(self, address: tuple[str, int], unix_path: str) -> None:
        """OSError when the address is taken; its text names the address."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/status", self._show)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, address[0], address[1]).start()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unix_path)  # of a control that was killed; the supervisor's lock says that there is no other
        await web.UnixSite(self._runner, unix_path).start()

    async def stop(self) -> None:
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
