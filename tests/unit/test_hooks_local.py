"""Which endpoints may be dialled directly: only what is here, and only while the right application listens alone."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address
from typing import Any

import pytest

from agent import host, netlink
from agent.config import Config
from agent.hooks import local, revoke, tables
from agent.hooks.filler import Filler
from agent.identity import IdentityRule, Selector
from agent.netlink import Socket
from agent.records import SERVICE, Address, service_key
from agent.snapshot import Snapshot
from policy.identity import SpiffeId

CORE = SpiffeId("demo.bank", "a", "core")
OTHER = SpiffeId("demo.bank", "a", "batch")
V4, V6 = ip_address("10.77.0.1"), ip_address("fd77::1")
FAR = ip_address("10.77.0.2")
POLICY = 'version: 1\nsame_node: {}\nrules: [{{name: r, allow: {{from: ["a/ledger"], to: [core]}}}}]\n'
SERVICES = """\
hosts: {a: {tunnel: "10.77.0.1:15008"}, b: {tunnel: "10.77.0.2:15008"}}
services:
  core:
    application: core
    ports: [9000]
    endpoints: [{host: a, address: 10.77.0.1}, {host: a, address: "fd77::1"}, {host: b, address: 10.77.0.2}]
    addresses: [10.99.0.1]
"""
RULES = (
    IdentityRule("core", Selector(cgroup=("core",))),
    IdentityRule("batch", Selector(cgroup=("batch",))),
    IdentityRule("ledger", Selector(cgroup=("ledger",))),
)
CGROUPS = {1: "/core", 2: "/batch", 3: "/elsewhere"}


def listener(address: str, cgroup: int, port: int = 9000) -> Socket:
    return Socket(ip_address(address), port, ip_address("0.0.0.0"), 0, cgroup, 0, 2, b"")


def identify(cgroup: int, _uid: int) -> SpiffeId | None:
    return {1: CORE, 2: OTHER}.get(cgroup)


def snapshot(same_node: str = "direct") -> Snapshot:
    return Snapshot(1, (("p", POLICY.format(same_node)),), ("s", SERVICES), "", ())


def test_only_real_addresses_of_this_host_are_candidates() -> None:
    table = tables.read_snapshot(snapshot(), "a", "demo.bank", RULES)
    assert local.candidates(table, "a") == {(V4, 9000): CORE, (V6, 9000): CORE}
    assert local.candidates(table, "c") == {}
    assert local.candidates(None, "a") == {}


def test_nothing_goes_directly_when_the_policy_wants_mutual_tls() -> None:
    assert local.candidates(tables.read_snapshot(snapshot("mtls"), "a", "demo.bank", RULES), "a") == {}


def test_an_address_that_is_not_here_is_no_candidate() -> None:
    assert local.here({(V4, 9000): CORE, (V6, 9000): CORE}, {V6}) == {(V6, 9000): CORE}


@pytest.mark.parametrize(
    ("listeners", "expected"),
    [
        ([], set()),
        ([listener("10.77.0.1", 1)], {V4}),
        ([listener("10.77.0.1", 1), listener("fd77::1", 1)], {V4, V6}),
        ([listener("0.0.0.0", 1)], {V4}),
        ([listener("::", 1)], {V4, V6}),
        ([listener("10.77.0.1", 2)], set()),
        ([listener("10.77.0.1", 1), listener("10.77.0.1", 2)], set()),
        ([listener("10.77.0.1", 1), listener("0.0.0.0", 2)], set()),
        ([listener("10.77.0.1", 1), listener("::", 2)], set()),
        ([listener("10.77.0.1", 1), listener("fd77::1", 2)], {V4}),
        ([listener("10.77.0.1", 1), listener("10.77.0.1", 2, port=9001)], {V4}),
        ([listener("127.0.0.1", 2), listener("10.77.0.1", 1)], {V4}),
        ([listener("10.77.0.1", 3)], set()),
        ([listener("10.77.0.1", 0)], set()),
    ],
)
def test_everybody_who_could_be_given_the_connection_has_to_be_the_right_one(
    listeners: list[Socket], expected: set[Address]
) -> None:
    wanted = {(V4, 9000): CORE, (V6, 9000): CORE}
    assert local.verified(wanted, listeners, identify) == {(address, 9000) for address in expected}


class FakeMap:
    fd = 0

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}

    def items(self) -> Any:
        return list(self.content.items())

    def update(self, key: bytes, value: bytes) -> None:
        self.content[key] = value

    def delete(self, key: bytes) -> bool:
        return self.content.pop(key, None) is not None


class World:
    """A filler over stand-ins for the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.listeners = [listener("10.77.0.1", 1)]
        self.here: set[Address] = {V4, V6}
        self.maps = {name: FakeMap() for name in ("services", "callers", "verdicts", "leases")}
        monkeypatch.setattr(netlink, "sockets", lambda states: self.listeners)
        monkeypatch.setattr(netlink, "local_addresses", lambda some: self.here & set(some))
        monkeypatch.setattr(host, "source_address", lambda address: None)
        monkeypatch.setattr(Filler, "_size", lambda self, name: 1000)
        config = dataclasses.replace(Config("a", "demo.bank", RULES), **settings)
        self.filler = Filler(config)
        self.filler.use(self.maps)  # type: ignore[arg-type]
        self.filler.see(CGROUPS)
        self.filler.take(snapshot())

    def look(self) -> bool:
        changed = self.filler.look()
        if changed:
            self.filler.write()
        self.filler.renew()
        return changed

    def marked(self) -> set[Address]:
        return {
            address
            for address in (V4, V6, FAR, ip_address("10.99.0.1"))
            if SERVICE.unpack(self.maps["services"].content[service_key(address, 9000)])[2]
        }


def test_a_snapshot_alone_marks_nothing_and_a_look_does(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    assert world.marked() == set()
    assert world.look()
    assert world.marked() == {V4}
    assert world.maps["leases"].content
    assert not world.look()


def test_a_listener_that_changes_hands_loses_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.look()
    for listeners in ([listener("10.77.0.1", 2)], [], [listener("10.77.0.1", 99)]):
        world.listeners = listeners
        world.look()
        assert world.marked() == set()


def test_a_new_snapshot_begins_without_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.look()
    world.filler.take(snapshot())
    assert world.marked() == set()


def test_an_address_that_has_moved_away_loses_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.look()
    world.here = set()
    world.look()
    assert world.marked() == set()


def test_without_the_check_of_listeners_only_the_address_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, check_listeners=False)
    world.listeners = []
    world.here = {V6}
    world.look()
    assert world.marked() == {V6}


def test_without_anything_local_there_is_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.listeners = []
    world.look()
    assert world.maps["leases"].content == {}


def test_who_may_be_somebody_else_by_executable_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, identities=(*RULES, IdentityRule("batch", Selector(exe="/usr/bin/batch"))))
    world.look()
    assert world.marked() == set()


LEDGER = SpiffeId("demo.bank", "a", "ledger")
DENY = "version: 1\nrules: []\n"


def connection(peer: str, cgroup: int, port: int = 9000) -> Socket:
    return Socket(V4, 40000, ip_address(peer), port, cgroup, 0, 2, b"")


@pytest.mark.parametrize(
    ("before", "after", "same_node", "cut"),
    [
        ("allow", "deny", "direct", True),
        ("allow", "allow", "direct", False),
        ("deny", "allow", "direct", False),
        ("deny", "deny", "direct", False),
        ("allow", "deny", "mtls", False),
    ],
)
def test_what_was_allowed_and_is_not_any_more_is_cut(before: str, after: str, same_node: str, cut: bool) -> None:
    texts = {"allow": POLICY.format(same_node), "deny": DENY}
    old, new = (
        tables.read_policy(Snapshot(1, (("p", texts[each]),), ("s", SERVICES), "", ())) for each in (before, after)
    )
    table = tables.read_snapshot(snapshot(same_node), "a", "demo.bank", RULES)
    ours = connection("10.77.0.1", 4)
    others = [
        connection("10.77.0.1", 1),  # another application, never allowed
        connection("10.77.0.1", 5),  # nobody we know, as the agent itself
        connection("10.77.0.1", 4, port=9001),  # another service
        connection("127.0.0.1", 4, port=15001),  # captured: the proxy cuts it
    ]
    who = {1: CORE, 4: LEDGER}.get
    found = revoke.revoked([*others, ours], table, old, new, "demo.bank", lambda cgroup, _uid: who(cgroup))
    assert found == ([ours] if cut else [])
