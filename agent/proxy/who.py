"""Asks hooks what only it may see: the path of a cgroup, the executable of a process."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable

from agent import channel
from agent.identity import Caller, ExeFile
from agent.proxy.loop import READ, Loop, Timer
from agent.records import Flow

TIMEOUT_S = 2.0
REMEMBERED = 4096

Answer = Callable[[Caller | None], None]


class Who:
    """Cgroup ids are never used again (kernfs counts them up), so their paths are remembered; executables are asked for
    each time. No answer means None, and the caller is then nobody."""

    def __init__(self, loop: Loop, sock: socket.socket, needs_exe: bool) -> None:
        self._loop = loop
        self._socket = sock
        self._needs_exe = needs_exe
        self._paths: OrderedDict[int, str] = OrderedDict()
        self._waiting: dict[int, tuple[Flow, Answer, Timer]] = {}
        self._last = 0
        loop.watch(sock.fileno(), READ, self._ready)

    def ask(self, flow: Flow, answer: Answer) -> None:
        """Calls `answer` at once when the answer is remembered, else later; exactly once."""
        path = self._paths.get(flow.cgroup)
        if path is not None and not self._needs_exe:
            answer(Caller(path, flow.uid))
            return
        self._last += 1
        number = self._last
        question = {
            "type": "who", "id": number, "cgroup": flow.cgroup, "pid": flow.pid, "exe": self._needs_exe,
            "started_ns": flow.started_ns,
        }  # fmt: skip
        if not channel.send(self._socket, question):
            answer(None)
            return
        timer = self._loop.after(TIMEOUT_S, lambda: self._answered(number, None, None))
        self._waiting[number] = (flow, answer, timer)

    def _ready(self, _mask: int) -> None:
        while (message := channel.receive(self._socket)) is not None:
            fields, _body = message
            exe = fields.get("exe")
            self._answered(fields["id"], fields.get("path"), ExeFile(exe[0], exe[1]) if exe else None)

    def _answered(self, number: int, path: str | None, exe: ExeFile | None) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return  # too late, or meant for the worker before this one
        flow, answer, timer = waiting
        timer.cancel()
        if path is None:
            answer(None)
            return
        self._paths[flow.cgroup] = path
        if len(self._paths) > REMEMBERED:
            self._paths.popitem(last=False)
        answer(Caller(path, flow.uid, exe))
