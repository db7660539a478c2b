"""A piece of kernel for one test: a cgroup subtree, a network namespace and a bpffs of its own, and processes in them.

Nothing outside of the subtree is ever attached to, and close() removes exactly what was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from ipaddress import ip_address
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from agent import bpfcall, host, records
from agent.config import Capture, Config
from agent.hooks import commands, pins
from agent.hooks.keeper import Keeper
from agent.hooks.site import Site, find_site
from agent.identity import IdentityRule, Selector

V4, V6 = "10.99.0.1", "fd99::1"
CAPTURE_PORT = 15001

_CLONE_NEWNET = 0x40000000
_NUMBERS = itertools.count(1)
_LIBC = ctypes.CDLL(None, use_errno=True)

Body = Callable[[Connection], Any]


class Child:
    """A forked process running one function; its result or its exception comes back over a pipe."""

    def __init__(self, kernel: Kernel, body: Body, cgroup: str, netns: int | None) -> None:
        self.talk, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.talk.close()
            _child(kernel, body, cgroup, netns, theirs)
        theirs.close()
        self.status: int | None = None

    def result(self, timeout: float = 20.0) -> Any:
        kind, value = self.receive(timeout)
        self.wait()
        if kind == "error":
            raise AssertionError(f"in the child:\n{value}")
        return value

    def receive(self, timeout: float = 20.0) -> Any:
        assert self.talk.poll(timeout), "the child said nothing in time"
        return self.talk.recv()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, number)
            self.wait()

    def wait(self, timeout: float = 20.0) -> int:
        deadline = time.monotonic() + timeout
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
            elif time.monotonic() > deadline:
                raise AssertionError("the child did not end in time")
            else:
                time.sleep(0.002)
        return self.status


def _child(kernel: Kernel, body: Body, cgroup: str, netns: int | None, talk: Connection) -> None:
    code = 1
    try:
        kernel.join(cgroup)
        if netns is not None and _LIBC.setns(netns, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        talk.send(("ok", body(talk)))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        talk.send(("error", traceback.format_exc()))
    finally:
        sys.stdout.flush()
        os._exit(code)


class Kernel:
    def __init__(self, directory: Path, max_flows: int = 1024, identities: tuple[IdentityRule, ...] = ()) -> None:
        self.directory = directory
        mount = host.cgroup_mount()
        assert mount is not None, "cgroup v2 is not mounted"
        self.mount = mount
        self.path = f"/underpass-test-{os.getpid()}-{next(_NUMBERS)}"
        self.children: list[Child] = []
        self._maps: dict[str, bpfcall.Map] = {}
        self._netns: list[int] = []
        for name in ("", "agent", "app", "server"):
            (Path(self.mount + self.path) / name).mkdir()
        self.config = Config(
            host="a",
            trust_domain="demo.bank",
            identities=identities or (IdentityRule("ledger", Selector(cgroup=(self.path[1:], "app"))),),
            cgroup_root=self.mount + self.path,
            state_dir=str(directory / "state"),
            bpffs=str(directory / "bpf"),
            capture=Capture(CAPTURE_PORT, max_flows),
        )
        self.netns = self.new_netns()

    # --- processes

    def start(self, body: Body, cgroup: str = "app", netns: int | None = None) -> Child:
        child = Child(self, body, cgroup, self.netns if netns is None else netns)
        self.children.append(child)
        return child

    def run(self, body: Callable[[], Any], cgroup: str = "app", netns: int | None = None) -> Any:
        return self.start(lambda _talk: body(), cgroup, netns).result()

    def join(self, cgroup: str) -> None:
        directory = self.mount if cgroup == "/" else f"{self.mount}{self.path}/{cgroup}"
        Path(directory, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def cgroup_id(self, name: str = "") -> int:
        return host.cgroup_id(f"{self.mount}{self.path}/{name}")

    def new_netns(self) -> int:
        """A namespace with a loopback that has our addresses; its descriptor."""
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            _hold_netns(theirs)
        try:
            assert ours.poll(10), "could not make a network namespace"
            assert ours.recv() == "made"
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            ours.send("enough")
            os.waitpid(pid, 0)
            ours.close()
            theirs.close()
        self._netns.append(fd)
        return fd

    # --- hooks

    def site(self) -> Site:
        """To be called in a child in the agent's cgroup."""
        return find_site(self.config)

    def install(self, cgroup: str = "agent") -> None:
        """Everything a first start does, without a policy."""
        self.run(lambda: install(self.site()), cgroup)

    def map(self, name: str) -> bpfcall.Map:
        if name not in self._maps:
            self._maps[name] = bpfcall.Map(bpfcall.get(f"{self.config.bpffs}/{name}"))
        return self._maps[name]

    def protect(
        self, address: str, port: int, service: int = 77, source: str | None = V4, local: bool = False
    ) -> None:
        shown = ip_address(source) if source else None
        self.map("services").update(
            records.service_key(ip_address(address), port), records.service_value(service, shown, local)
        )

    def lease(self, seconds: float) -> None:
        """Let marks of local services hold for that long."""
        until = host.boottime_ns() + int(seconds * 1e9)
        self.map("leases").update(bytes(4), records.LEASE.pack(until))

    def judge(self, service: int, kind: records.VerdictKind, rule: int, caller: int = 500) -> None:
        self.map("callers").update(records.caller_key(self.cgroup_id("app")), caller.to_bytes(4, sys.byteorder))
        self.map("verdicts").update(records.verdict_key(caller, service), records.verdict_value(kind, rule))

    def exits(self) -> dict[str, int]:
        return commands._exits(self.map("exits"))

    def flows(self) -> list[tuple[bytes, bytes]]:
        return list(self.map("flows").items())

    def fill_flows(self) -> int:
        """A hash holds a little more than asked for (one spare element for each CPU): add until it refuses."""
        address = ip_address(V4)
        value = records.pack_flow(records.Flow(1, 1, 1, address, None, 0, 0, 0, 0, 1, 1, records.Role.CAPTURED))
        for count in itertools.count():
            try:
                self.map("flows").update(records.TUPLE.pack(0, os.urandom(16), bytes(16), 0, 0, 0), value)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                return count
        raise AssertionError("a hash without end")

    def note(self, sock: socket.socket) -> records.Flow | None:
        """The flow of a socket of this process."""
        value = self.map("socket_flows").lookup(sock.fileno().to_bytes(4, sys.byteorder))
        return records.unpack_flow(value) if value else None

    def mark(self, listener: socket.socket) -> None:
        """As the supervisor does with the agent's capture listeners."""
        address = ip_address(listener.getsockname()[0])
        self.map("socket_flows").update(listener.fileno().to_bytes(4, sys.byteorder), records.listening(address))

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.talk.close()
        for table in self._maps.values():
            os.close(table.fd)
        for fd in self._netns:
            os.close(fd)
        with contextlib.suppress(Exception):
            commands.hooks_remove(self.config)
        if os.path.ismount(self.config.bpffs):
            pins.unmount(Path(self.config.bpffs))
        for directory in sorted(Path(self.mount + self.path).rglob("*/"), reverse=True):
            _rmdir(directory)
        _rmdir(Path(self.mount + self.path))
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_until(condition: Callable[[], bool], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within} s"
        time.sleep(0.01)


def install(site: Site) -> None:
    keeper = Keeper(site)
    keeper.open()
    if not keeper.is_loaded():
        keeper.compile().wait()
        keeper.promote()
    maps = keeper.open_maps()
    keeper.write_settings(maps["settings"])
    keeper.keep(maps)
    keeper.close()


def _rmdir(directory: Path) -> None:
    deadline = time.monotonic() + 2.0
    while directory.is_dir():
        try:
            directory.rmdir()
        except OSError:  # a process that has just ended may still be leaving
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _hold_netns(talk: Connection) -> None:
    """Be in a new namespace until its descriptor has been taken."""
    try:
        if _LIBC.unshare(_CLONE_NEWNET) == 0:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            subprocess.run(["ip", "addr", "add", f"{V4}/32", "dev", "lo"], check=True)
            subprocess.run(["ip", "addr", "add", f"{V6}/128", "dev", "lo", "nodad"], check=True)
            talk.send("made")
            talk.recv()
    finally:
        os._exit(0)
