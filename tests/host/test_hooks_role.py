"""The hooks role as the supervisor sees it: one process with channels."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from agent import bpfcall, channel, host, records
from agent.hooks import attach, commands, pins, role, source
from agent.identity import IdentityRule, Selector
from agent.snapshot import Snapshot, encode
from policy.compile import stable_id
from tests.host.conftest import NewKernel
from tests.host.kernel_fixture import V4, Child, Kernel, wait_until
from tests.host.test_hooks_lifecycle import _LINK_DETACH, ONE_OF_EACH, attached

SERVICES = f"""\
hosts:
  b: {{tunnel: "10.99.0.1:15008"}}
services:
  core-db:
    application: postgres
    ports: [5432]
    endpoints:
      - {{host: b, address: {V4}}}
"""
ALLOW = """\
version: 1
rules:
  - name: ledger-reads-core
    allow: {from: ["a/ledger"], to: [core-db]}
"""
CORE_DB = stable_id("service", "core-db")
KEY = records.service_key(ip_address(V4), 5432)


def snapshot(generation: int = 1, policy: str = ALLOW, services: str = SERVICES) -> Snapshot:
    return Snapshot(generation, (("policy.yaml", policy),), ("services.yaml", services), "", ())


class Running:
    """The role in a process of its own, and our ends of its channels."""

    def __init__(self, kernel: Kernel) -> None:
        pairs = [channel.pair(1 << 20) for _ in range(3)]
        self.status, self.orders, self.who = (ours for ours, _theirs in pairs)
        theirs = [end for _ours, end in pairs]
        self.kernel = kernel

        def body(_talk: object) -> int:
            for ours, _ in pairs:
                ours.close()
            return role.main(kernel.config, theirs[0], theirs[1], [theirs[2]])

        self.child: Child = kernel.start(body, "agent")
        for end in theirs:
            end.close()

    def give(self, given: Snapshot) -> None:
        assert channel.send(self.orders, {"type": "snapshot"}, encode(given))

    def hear(self, kind: str, within: float = 8.0) -> dict[str, Any]:
        """The next message of a kind on the status channel; those before it are passed over."""
        return _next(self.status, lambda message: message["type"] == kind, within)

    def ask(self, **question: Any) -> dict[str, Any]:
        assert channel.send(self.who, {"type": "who", "id": 1, "pid": 0, "exe": False, "started_ns": 0} | question)
        return _next(self.who, lambda message: message["type"] == "whois", 5.0)


def _next(end: socket.socket, is_it: Callable[[dict[str, Any]], bool], within: float) -> dict[str, Any]:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        received = channel.receive(end)
        if received is None:
            time.sleep(0.005)
        elif is_it(received[0]):
            return received[0]
    raise AssertionError(f"not heard within {within} s")


@pytest.fixture
def running(new_kernel: NewKernel) -> Running:
    """Attached, with the first snapshot applied."""
    found = Running(new_kernel())
    found.hear("maps")
    found.give(snapshot())
    found.hear("ready")
    return found


def connect(port: int = 5432) -> int:
    with socket.socket() as sock:
        return sock.connect_ex((V4, port))


def test_nothing_is_captured_before_the_first_table_is_written(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    running = Running(kernel)
    running.hear("maps")
    assert _next(running.orders, lambda message: message["type"] == "hello", 5.0)
    time.sleep(0.3)
    assert set(attached(kernel).values()) == {0}
    running.give(snapshot())
    running.hear("ready")
    assert attached(kernel) == ONE_OF_EACH
    assert records.SERVICE.unpack(kernel.map("services").lookup(KEY) or b"")[1] == CORE_DB
    assert running.hear("beat")["attached"]
    assert running.child.status is None


def test_the_tables_say_who_may(running: Running) -> None:
    kernel = running.kernel
    service = records.SERVICE.unpack(kernel.map("services").lookup(KEY) or b"")
    assert records.unpack_address(service[0]) == ip_address(V4), "the address this host would use toward it"
    assert kernel.run(connect, "app") == errno.ECONNREFUSED, "captured, and no proxy listens"
    assert kernel.exits()["no_proxy"] == 1
    assert kernel.run(connect, "server") == errno.EPERM, "no identity"
    assert kernel.exits()["denied"] == 1


def test_a_new_cgroup_is_known_within_a_second(running: Running) -> None:
    kernel = running.kernel
    new = Path(kernel.mount + kernel.path) / "app" / "worker"
    new.mkdir()
    key = records.caller_key(host.cgroup_id(str(new)))
    wait_until(lambda: kernel.map("callers").lookup(key) is not None, 2.0)
    caller = int.from_bytes(kernel.map("callers").lookup(key) or b"", sys.byteorder)
    assert caller == stable_id("caller", "spiffe://demo.bank/a/ledger")
    new.rmdir()
    wait_until(lambda: kernel.map("callers").lookup(key) is None, 2.0)


def test_a_changed_policy_reaches_the_kernel(running: Running) -> None:
    kernel = running.kernel
    running.give(snapshot(2, "version: 1\nrules: []\n"))
    wait_until(lambda: kernel.run(connect, "app") == errno.EPERM)
    running.give(snapshot(3, ALLOW, SERVICES.replace("[5432]", "[5433]")))
    wait_until(lambda: kernel.map("services").lookup(KEY) is None)
    assert kernel.map("services").lookup(records.service_key(ip_address(V4), 5433)) is not None


@pytest.mark.parametrize("policy", ["version: 1\nrulez: []\n", "version: 7\n", ":"])
def test_a_bad_snapshot_changes_nothing_and_is_told(running: Running, policy: str) -> None:
    kernel = running.kernel
    before = {name: dict(kernel.map(name).items()) for name in ("services", "verdicts")}
    running.give(snapshot(2, policy))
    text = running.hear("problem")["text"]
    assert text.startswith("snapshot refused, the one before stays: ")
    assert {name: dict(kernel.map(name).items()) for name in before} == before
    assert running.hear("beat")["generation"] == 1
    running.give(snapshot(3))
    running.hear("ready")


def test_who_is_asked_by_cgroup(running: Running) -> None:
    kernel = running.kernel
    assert running.ask(id=7, cgroup=kernel.cgroup_id("app")) == {
        "type": "whois", "id": 7, "path": f"{kernel.path}/app", "exe": None
    }  # fmt: skip
    new = Path(kernel.mount + kernel.path) / "just made"
    new.mkdir()
    assert running.ask(cgroup=host.cgroup_id(str(new)))["path"] == f"{kernel.path}/just made"
    new.rmdir()
    assert running.ask(cgroup=2**63)["path"] is None
    assert running.ask(cgroup=host.cgroup_id(kernel.mount))["path"] == "/"


def test_who_is_asked_by_process(running: Running) -> None:
    kernel = running.kernel
    client = kernel.start(lambda talk: talk.recv())
    program = os.stat(sys.executable)
    asked = {"cgroup": kernel.cgroup_id("app"), "pid": client.pid, "exe": True}
    answer = running.ask(**asked, started_ns=host.boottime_ns())
    assert answer["exe"] == [program.st_dev, program.st_ino, os.path.realpath(sys.executable)]
    assert running.ask(**asked, started_ns=1)["exe"] is None, "this process is younger than the connect"
    client.talk.send("enough")
    client.result()
    assert running.ask(**asked, started_ns=host.boottime_ns())["exe"] is None


def test_nonsense_from_a_proxy_harms_nobody(running: Running) -> None:
    for nonsense in ({"type": "who"}, {"type": "who", "id": "x", "cgroup": []}, {"type": "else"}, {}):
        assert channel.send(running.who, nonsense)
    running.who.send(b"not json")
    assert running.ask(cgroup=running.kernel.cgroup_id("app"))["path"] == f"{running.kernel.path}/app"


def test_a_detached_link_is_attached_again_and_told(running: Running) -> None:
    kernel = running.kernel
    link = bpfcall.get(f"{kernel.config.bpffs}/links/connect4")
    bpfcall._call(_LINK_DETACH, struct.pack("=I", link))
    os.close(link)
    assert attached(kernel)["connect4"] == 0
    wait_until(lambda: attached(kernel) == ONE_OF_EACH)
    assert "repaired: replace connect4" in running.hear("problem")["text"]
    running.hear("ready")
    wait_until(lambda: running.hear("beat")["repairs"] == 1)


def test_removed_pins_are_made_again(running: Running) -> None:
    kernel = running.kernel
    where = pins.Pins(Path(kernel.config.bpffs))
    number = bpfcall.map_info(kernel.map("flows").fd).id
    where.map("flows").unlink()
    (where.links / "sockops").unlink()
    (where.programs / "connect6").unlink()
    running.hear("ready")
    assert attached(kernel) == ONE_OF_EACH
    fd = bpfcall.get(str(where.map("flows")))
    assert bpfcall.map_info(fd).id == number, "the same map: flows in it stay valid"
    os.close(fd)


def test_changed_settings_are_put_right(running: Running) -> None:
    settings = running.kernel.map("settings")
    right = settings.lookup(bytes(4)) or b""
    settings.update(bytes(4), bytes(len(right)))
    wait_until(lambda: settings.lookup(bytes(4)) == right)


def test_old_entries_are_swept_and_young_ones_stay(running: Running) -> None:
    flows, now = running.kernel.map("flows"), host.boottime_ns()

    def put(netns: int, age_s: int) -> bytes:
        key = records.TUPLE.pack(netns, os.urandom(16), bytes(16), 1, 2, 0)
        address = ip_address(V4)
        flow = records.Flow(1, 1, now - age_s * 10**9, address, None, 0, 0, 0, 0, 1, 1, records.Role.CAPTURED)
        flows.update(key, records.pack_flow(flow))
        return key

    old = {put(0, 31), put(5, 301)}
    young = {put(0, 5), put(5, 200)}
    wait_until(lambda: {key for key, _value in flows.items()} == young, 8.0)
    assert not old & young
    swept = {"swept_reservations": 1, "swept_entries": 1}
    wait_until(lambda: swept.items() <= running.hear("beat").items())


def test_sigterm_leaves_everything_attached_and_a_successor_takes_over(running: Running) -> None:
    kernel = running.kernel
    before = attach.pinned_links(pins.Pins(Path(kernel.config.bpffs)))
    os.kill(running.child.pid, signal.SIGTERM)
    assert running.child.result() == 0
    assert attached(kernel) == ONE_OF_EACH
    assert kernel.run(connect, "server") == errno.EPERM, "protection outlives the process"
    started = time.monotonic()
    successor = Running(kernel)
    successor.hear("maps")
    successor.hear("ready")
    assert time.monotonic() - started < 2.0, "nothing was compiled, and no snapshot was needed"
    assert attach.pinned_links(pins.Pins(Path(kernel.config.bpffs))) == before


def test_killed_at_any_time_the_next_one_has_exactly_one_of_each(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    random.seed(1)
    for delay in sorted(random.uniform(0, 1.5) for _ in range(6)):
        victim = Running(kernel)
        victim.give(snapshot())
        time.sleep(delay)
        victim.child.kill()
    last = Running(kernel)
    last.give(snapshot())
    last.hear("ready")
    assert attached(kernel) == ONE_OF_EACH
    status = commands.hooks_status(kernel.config)
    assert [entry["attached"] for entry in status["programs"]] == [1] * len(source.PROGRAMS)
    assert status["compiled_from_this_version"]


def test_it_ends_when_the_supervisor_is_gone(running: Running) -> None:
    running.status.close()
    running.orders.close()
    running.who.close()
    assert running.child.result() == 1
    assert attached(running.kernel) == ONE_OF_EACH


def test_two_at_once_are_refused_by_name(running: Running) -> None:
    second = Running(running.kernel)
    assert "another hooks process holds" in second.hear("problem")["text"]
    assert second.child.result() == 1


def test_a_rule_that_asks_for_an_executable_is_left_to_the_proxy(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel_rules = (
        IdentityRule("ledger", Selector(cgroup=(kernel.path[1:], "app"), uid=1234)),
        IdentityRule("batch", Selector(cgroup=(kernel.path[1:], "app"), exe="/usr/bin/true")),
    )
    kernel.config = replace(kernel.config, identities=kernel_rules)
    running = Running(kernel)
    running.give(snapshot())
    running.hear("ready")
    assert kernel.run(connect, "app") == errno.ECONNREFUSED, "captured: only the proxy can tell"
    assert kernel.run(connect, "server") == errno.EPERM
