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
MESSAGES_PER_TURN = 64  # bounded: a role that never stops talking must not keep us from the others
COUNTS = ("lost_outcomes", "defects")  # what proxies count, and everybody should see

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
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # told by the living process
    past: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # of those before it
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
        self._unwritten = False

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
        try:
            role.process = self._spawn(role.name, role.needs)
        except OSError as error:  # no process or memory left: the other roles must not go down for it
            self._put_off(role, now, now)
            role.problem = f"cannot be started: {error.strerror or error}"
            log.error("%s %s; next start in %.1f s", role.name, role.problem, role.backoff)
            return
        role.started = role.beat = now
        role.ready = False
        role.restarts += 1
        role.told.clear()
        log.info("%s started as %d", role.name, role.process.pid)

    def _bury(self, role: Role, code: int, now: float) -> None:
        while self._hear(role):  # its last words must not count for its successor
            pass
        role.past = {name: role.past[name] + role.counts[name] for name in COUNTS}
        role.counts = dict.fromkeys(COUNTS, 0)
        self._put_off(role, role.started, now)
        log.error("%s ended by %s; next start in %.1f s", role.name, _how(code), role.backoff)
        role.process = None
        role.ready = False
        self._was_ready = False

    def _put_off(self, role: Role, started: float, now: float) -> None:
        stable = now - started > STABLE_AFTER_S
        role.backoff = FIRST_BACKOFF_S if stable else min(role.backoff * 2, LONGEST_BACKOFF_S)
        role.restart_at = now + role.backoff

    def _listen(self) -> None:
        by_fd = {role.status.fileno(): role for role in self._roles.values()}
        try:
            readable, _, _ = select.select(list(by_fd), [], [], TICK_S)
        except InterruptedError:
            return
        for fd in readable:
            self._hear(by_fd[fd])

    def _hear(self, role: Role) -> bool:
        """Whether there may be more. What is no message is dropped: roles without privileges must not fell us."""
        for _ in range(MESSAGES_PER_TURN):
            try:
                message = channel.receive(role.status)
            except ValueError as error:
                log.error("%s said what is no message: %s", role.name, error)
                continue
            if message is None:
                return False
            self._heard(role, message[0])
        return True

    def _heard(self, role: Role, message: channel.Message) -> None:
        kind = str(message.get("type"))
        role.beat = time.monotonic()
        role.told.add(kind)
        if kind == "ready":
            role.ready, role.problem = True, ""
        elif kind == "problem":
            role.problem = str(message.get("text", ""))
            log.error("%s: %s", role.name, role.problem)
        elif kind == "note":
            log.warning("%s: %s", role.name, message.get("text", ""))
        elif kind == "beat":
            told = {name: message.get(name) for name in COUNTS}
            role.counts |= {name: count for name, count in told.items() if isinstance(count, int)}

    def _publish(self) -> None:
        if self._reload:
            self._reload = False
            self._tell_reload()
        states = {role.name: _state(role) for role in self._roles.values()}
        if states != self._published:
            self._write(states)
        ready = bool(states) and all(state.ready for state in states.values())
        if ready and not self._was_ready:
            log.info("ready")
            self._on_ready()
        self._was_ready = ready

    def _tell_reload(self) -> None:
        """A control that is not ready may have no handler yet and would die of it; it reads everything anyway."""
        control = self._roles.get("control")
        if control is not None and control.ready:
            self._signal("control", signal.SIGHUP)

    def _write(self, states: dict[str, RoleState]) -> None:
        try:
            runstate.write(self._run_dir, os.getpid(), states)
        except OSError as error:
            if not self._unwritten:
                log.error("cannot write to %s: %s; status is out of date meanwhile", self._run_dir, error.strerror)
            self._unwritten = True  # and tried again in the next turn
        else:
            self._published, self._unwritten = states, False

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


def _state(role: Role) -> RoleState:
    counts = {name: role.past[name] + role.counts[name] for name in COUNTS}
    pid = role.process.pid if role.process else 0
    return RoleState(pid, role.ready, max(0, role.restarts), role.problem, **counts)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal: most have no name
        return f"signal {-code}"
