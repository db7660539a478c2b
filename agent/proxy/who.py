"""Asks hooks what only it may see: the path of a cgroup, the executable of a process, who listens where."""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from agent import channel
from agent.identity import Caller, ExeFile
from agent.proxy.loop import READ, Loop, Timer
from agent.records import Flow

TIMEOUT_S = 2.0
REMEMBERED = 4096

LISTENER_FRESH_S = 1.0

Answer = Callable[[Caller | None], None]
Owners = Callable[[list[Caller] | None], None]
Fields = dict[str, Any]


class Who:
    """Cgroup ids are never used again (kernfs counts them up), so their paths are remembered; executables are asked for
    each time. No answer means None, and the caller is then nobody."""

    def __init__(
        self, loop: Loop, sock: socket.socket, needs_exe: bool, failed: Callable[[Exception], None]
    ) -> None:
        """`failed` is told of what an answer ran into: it concerns one stream, and the others need this channel."""
        self._loop = loop
        self._failed = failed
        self._socket = sock
        self._needs_exe = needs_exe
        self._paths: OrderedDict[int, str] = OrderedDict()
        self._waiting: dict[int, tuple[Callable[[Fields | None], None], Timer]] = {}
        self._listeners: dict[tuple[str, int], tuple[float, list[Caller]]] = {}
        self._last = 0
        loop.watch(sock.fileno(), READ, self._ready)

    def ask(self, flow: Flow, answer: Answer) -> None:
        """Calls `answer` at once when the answer is remembered, else later; exactly once."""
        path = self._paths.get(flow.cgroup)
        if path is not None and not self._needs_exe:
            answer(Caller(path, flow.uid))
            return
        question = {
            "type": "who",
            "cgroup": flow.cgroup,
            "pid": flow.pid,
            "exe": self._needs_exe,
            "started_ns": flow.started_ns,
        }
        self._send(question, lambda fields: answer(self._caller(flow, fields)))

    def ask_listener(self, address: str, port: int, answer: Owners) -> None:
        """Who would be given a connection to address:port; an empty list when nobody listens there."""
        asked = (address, port)
        remembered = self._listeners.get(asked)
        if remembered is not None and time.monotonic() - remembered[0] < LISTENER_FRESH_S:
            answer(remembered[1])
            return
        question = {"type": "who", "cgroup": 0, "listener": [address, port], "exe": self._needs_exe}
        self._send(question, lambda fields: answer(self._owners(asked, fields)))

    def _caller(self, flow: Flow, fields: Fields | None) -> Caller | None:
        path = fields.get("path") if fields else None
        if fields is None or path is None:
            return None
        self._paths[flow.cgroup] = path
        if len(self._paths) > REMEMBERED:
            self._paths.popitem(last=False)
        return Caller(path, flow.uid, _exe(fields.get("exe")))

    def _owners(self, asked: tuple[str, int], fields: Fields | None) -> list[Caller] | None:
        if fields is None:
            return None
        owners = [Caller(path or "", uid, _exe(exe)) for path, uid, exe in fields.get("owners", [])]
        if len(self._listeners) > REMEMBERED:
            self._listeners.clear()
        self._listeners[asked] = (time.monotonic(), owners)
        return owners

    def _send(self, question: Fields, answered: Callable[[Fields | None], None]) -> None:
        self._last += 1
        number = self._last
        if not channel.send(self._socket, {**question, "id": number}):
            answered(None)
            return
        timer = self._loop.after(TIMEOUT_S, lambda: self._answered(number, None))
        self._waiting[number] = (answered, timer)

    def _ready(self, _mask: int) -> None:
        while True:
            try:
                message = channel.receive(self._socket)
                if message is None:
                    return
                self._answered(int(message[0].get("id", 0)), message[0])
            except ConnectionResetError:  # the supervisor is gone, and this worker drains
                self._loop.forget(self._socket.fileno())
                return
            except Exception as error:  # noqa: BLE001 - see __init__
                self._failed(error)

    def _answered(self, number: int, fields: Fields | None) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return  # too late, or meant for the worker before this one
        waiting[1].cancel()
        waiting[0](fields)


def _exe(found: list[Any] | None) -> ExeFile | None:
    return ExeFile(found[0], found[1]) if found else None
