"""The supervisor: starts the roles, restarts what dies, hands every successor the same channels and listeners.

It keeps both ends of every channel and every listening socket for its whole life. So a role that is killed leaves
nothing behind that its successor would have to find again, and connections that wait in a listen queue stay there.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agent import channel, runstate
from agent.runstate import RoleState

log = logging.getLogger("underpass.supervisor")

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 5.0
STABLE_AFTER_S = 10.0
TICK_S = 0.25
BEAT_LIMIT_S = 20.0

Spawn = Callable[[str, Mapping[str, int]], "subprocess.Popen[bytes]"]


@dataclass(slots=True)
class Role:
    """One process and how it fares. `needs` maps the names of descriptors it inherits to their numbers here."""

    name: str
    needs: dict[str, int]
    status: socket.socket  # the supervisor's end
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    started: float = 0.0
    beat: float = 0.0
    restarts: int = -1
    backoff: float = FIRST_BACKOFF_S
    restart_at: float = 0.0
    problem: str = ""
    told: set[str] = field(default_factory=set)


class Supervisor:
    def __init__(self, run_dir: str, spawn: Spawn, on_ready: Callable[[], None]) -> None:
        self._run_dir = run_dir
        self._spawn = spawn
        self._on_ready = on_ready
        self._roles: dict[str, Role] = {}
        self._stopping = False
        self._reload = False
        self._was_ready = False
        self._published: dict[str, RoleState] | None = None

    def add(self, name: str, needs: dict[str, int], status: socket.socket) -> None:
        self._roles[name] = Role(name, needs, status)

    def catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)

    def run(self, until: Callable[[], bool] | None = None) -> bool:
        """Keep the roles alive until told to stop, or until `until` holds. False when told to stop."""
        while not self._stopping:
            now = time.monotonic()
            for role in self._roles.values():
                self._care_for(role, now)
            self._listen()
            self._publish()
            if until is not None and until():
                return True
        return False

    def told(self, name: str, what: str) -> bool:
        """Whether the living process of a role has said `what` since it started."""
        return what in self._roles[name].told

    def stop(self, drain: float) -> None:
        """End proxies first (they drain), then the rest. What does not end in time is killed."""
        proxies = [role for role in self._roles.values() if role.name.startswith("proxy")]
        others = [role for role in self._roles.values() if not role.name.startswith("proxy")]
        self._end(proxies, drain + 2.0)
        self._end(others, 5.0)
        self._publish()

    # One turn

    def _care_for(self, role: Role, now: float) -> None:
        if role.process is None:
            if now >= role.restart_at:
                self._start(role, now)
            return
        code = role.process.poll()
        if code is not None:
            self._bury(role, code, now)
        elif role.ready and now - role.beat > BEAT_LIMIT_S:
            log.error("%s has not moved for %.0f s: killing it", role.name, now - role.beat)
            role.process.kill()

    def _start(self, role: Role, now: float) -> None:
        role.process = self._spawn(role.name, role.needs)
        role.started = role.beat = now
        role.ready = False
        role.restarts += 1
        role.told.clear()
        log.info("%s started as %d", role.name, role.process.pid)

    def _bury(self, role: Role, code: int, now: float) -> None:
        self._hear(role)  # its last words must not count for its successor
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        role.backoff = (
            FIRST_BACKOFF_S if now - role.started > STABLE_AFTER_S else min(role.backoff * 2, LONGEST_BACKOFF_S)
        )
        role.restart_at = now + role.backoff
        log.error("%s ended by %s; next start in %.1f s", role.name, how, role.backoff)
        role.process = None
        role.ready = False
        self._was_ready = False

    def _listen(self) -> None:
        by_fd = {role.status.fileno(): role for role in self._roles.values()}
        try:
            readable, _, _ = select.select(list(by_fd), [], [], TICK_S)
        except InterruptedError:
            return
        for fd in readable:
            self._hear(by_fd[fd])

    def _hear(self, role: Role) -> None:
        while (message := channel.receive(role.status)) is not None:
            kind = str(message[0].get("type"))
            role.beat = time.monotonic()
            role.told.add(kind)
            if kind == "ready":
                role.ready, role.problem = True, ""
            elif kind == "problem":
                role.problem = str(message[0].get("text", ""))
                log.error("%s: %s", role.name, role.problem)
            elif kind == "note":
                log.warning("%s: %s", role.name, message[0].get("text", ""))

    def _publish(self) -> None:
        if self._reload:
            self._reload = False
            self._signal("control", signal.SIGHUP)
        states = {
            role.name: RoleState(
                role.process.pid if role.process else 0, role.ready, max(0, role.restarts), role.problem
            )
            for role in self._roles.values()
        }
        if states != self._published:
            self._published = states
            runstate.write(self._run_dir, os.getpid(), states)
        ready = bool(states) and all(state.ready for state in states.values())
        if ready and not self._was_ready:
            log.info("ready")
            self._on_ready()
        self._was_ready = ready

    # Endings

    def _end(self, roles: list[Role], limit: float) -> None:
        for role in roles:
            self._signal(role.name, signal.SIGTERM)
        deadline = time.monotonic() + limit
        for role in roles:
            if role.process is None:
                continue
            try:
                role.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("%s did not end in %.0f s: killing it", role.name, limit)
                role.process.kill()
                role.process.wait()
            role.process = None
            role.ready = False

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._roles[name].process
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def _on_stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _on_reload(self, _number: int, _frame: object) -> None:
        self._reload = True
