"""From identity rules, policy and services to the bytes of the kernel's tables."""

from __future__ import annotations

import sys
from ipaddress import ip_address
from typing import Any

import pytest

from agent import host, records
from agent.hooks import sweep, tables
from agent.hooks.problem import Problem
from agent.hooks.tables import Content, Tables, caller_entries
from agent.identity import IdentityRule, Selector
from agent.records import VerdictKind
from agent.snapshot import Snapshot
from policy.compile import stable_id
from policy.fields import Invalid

IDS = {"ledger": 500, "batch": 600}
NOBODY, UNKNOWN = records.CALLER_NOBODY, records.CALLER_UNKNOWN
ANY = records.ANY_UID


def rule(application: str, **match: Any) -> IdentityRule:
    return IdentityRule(application, Selector(**match))


def callers(path: str, *rules: IdentityRule) -> dict[int, int]:
    """uid to caller id, for one cgroup."""
    entries = caller_entries(9, path, rules, IDS)
    found = {records.CALLER_KEY.unpack(key): int.from_bytes(value, sys.byteorder) for key, value in entries.items()}
    assert all(cgroup == 9 for cgroup, _uid, _pad in found)
    return {uid: caller for (_cgroup, uid, _pad), caller in found.items()}


LEDGER = ("bank", "ledger")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([rule("ledger", cgroup=LEDGER)], {ANY: 500}),
        ([rule("ledger", cgroup=("bank", "other"))], {ANY: NOBODY}),
        ([], {ANY: NOBODY}),
        ([rule("ledger", uid=7)], {ANY: NOBODY, 7: 500}),
        ([rule("ledger", cgroup=LEDGER, uid=7)], {ANY: NOBODY, 7: 500}),
        ([rule("ledger", cgroup=LEDGER), rule("ledger", uid=7)], {ANY: 500}),
        ([rule("ledger", cgroup=LEDGER), rule("batch", uid=7)], {ANY: 500, 7: UNKNOWN}),
        ([rule("ledger", cgroup=LEDGER), rule("batch", cgroup=LEDGER)], {}),
        ([rule("ledger", cgroup=LEDGER, exe="/bin/a")], {}),
        ([rule("ledger", uid=7, exe="/bin/a")], {ANY: NOBODY, 7: UNKNOWN}),
        ([rule("ledger", exe="/bin/a")], {}),
        ([rule("ledger", cgroup=LEDGER), rule("batch", exe="/bin/a")], {}),
        ([rule("ledger", cgroup=("bank", "other"), exe="/bin/a")], {ANY: NOBODY}),
        ([rule("ledger", uid="not-yet-made")], {}),
        ([rule("ledger", cgroup=("bank", "other"), uid="not-yet-made")], {ANY: NOBODY}),
        ([rule("ledger", uid=7), rule("batch", uid=8)], {ANY: NOBODY, 7: 500, 8: 600}),
    ],
    ids=str,
)
def test_what_the_kernel_may_know_of_a_cgroup(rules: list[IdentityRule], expected: dict[int, int]) -> None:
    assert callers("/bank/ledger/worker", *rules) == expected


POLICY = """\
version: 1
rules:
  - name: read
    allow: {from: ["a/ledger"], to: [core-db]}
  - name: never
    deny: {from: ["a/batch"], to: [core-db]}
"""
SERVICES = """\
hosts:
  b: {tunnel: "192.0.2.2:15008"}
services:
  core-db:
    application: postgres
    ports: ["5432-5433"]
    endpoints:
      - {host: b, address: 192.0.2.2}
      - {host: b, address: "fd77::2"}
"""
RULES = [rule("ledger", uid=7), rule("batch", uid=8), rule("ledger", uid=9)]


def table(policy: str = POLICY) -> Any:
    snapshot = Snapshot(1, (("p", policy),), ("s", SERVICES), "", ())
    return tables.read_snapshot(snapshot, "a", "demo.bank", RULES)


def test_every_address_and_port_of_a_service_is_captured_with_its_source() -> None:
    source = ip_address("192.0.2.1")
    entries = tables.service_entries(table(), {ip_address("192.0.2.2"): source, ip_address("fd77::2"): None})
    service = stable_id("service", "core-db")
    assert entries == {
        records.service_key(ip_address(address), port): records.service_value(service, shown)
        for address, shown in (("192.0.2.2", source), ("fd77::2", None))
        for port in (5432, 5433)
    }


def test_verdicts_carry_their_rule_and_asking_needs_no_entry() -> None:
    entries = tables.verdict_entries(table())
    ids, service = tables.caller_ids(table()), stable_id("service", "core-db")
    assert entries == {
        records.verdict_key(ids["ledger"], service): records.verdict_value(
            VerdictKind.ALLOW, stable_id("rule", "read")
        ),
        records.verdict_key(ids["batch"], service): records.verdict_value(VerdictKind.DENY, stable_id("rule", "never")),
        records.verdict_key(NOBODY, service): records.verdict_value(VerdictKind.DENY, stable_id("rule", "default")),
    }


def test_a_wrong_snapshot_is_refused_whole() -> None:
    with pytest.raises(Invalid):
        table("version: 1\nrulez: []\n")


class FakeMap:
    """Stands for a kernel map; `log` is shared between the maps of one test and keeps the order."""

    def __init__(self, name: str, log: list[tuple[str, str, bytes]], content: dict[bytes, bytes]) -> None:
        self.name, self.log, self.content = name, log, dict(content)
        self.full = False

    def items(self) -> Any:
        return list(self.content.items())

    def update(self, key: bytes, value: bytes) -> None:
        if self.full:
            raise OSError(7, "Argument list too long")
        self.log.append(("put", self.name, key))
        self.content[key] = value

    def delete(self, key: bytes) -> bool:
        self.log.append(("drop", self.name, key))
        return self.content.pop(key, None) is not None


def maps(**content: dict[bytes, bytes]) -> tuple[Any, dict[str, FakeMap], list[tuple[str, str, bytes]]]:
    log: list[tuple[str, str, bytes]] = []
    made = {name: FakeMap(name, log, content.get(name, {})) for name in ("services", "callers", "verdicts")}
    return Tables(made["services"], made["callers"], made["verdicts"]), made, log  # type: ignore[arg-type]


OLD = {name: {b"old": b"1", b"same": b"1", b"else": b"1"} for name in ("services", "callers", "verdicts")}
NEW = {b"new": b"1", b"same": b"1", b"else": b"2"}


def test_services_are_added_first_and_removed_last() -> None:
    written, made, log = maps(**OLD)
    assert written.write(Content(NEW, NEW, NEW), 100) == 9
    assert all(each.content == NEW for each in made.values())
    order = [(act, name) for act, name, _key in log]
    assert order[0] == order[1] == ("put", "services")
    assert order[-1] == ("drop", "services")
    assert order.index(("put", "verdicts")) < order.index(("put", "callers"))
    assert not [key for _act, _name, key in log if key == b"same"], "what is right is not touched"


def test_a_second_write_touches_only_the_difference() -> None:
    written, _made, log = maps()
    written.write(Content(NEW, NEW, NEW), 100)
    log.clear()
    assert written.write(Content(NEW, NEW | {b"more": b"1"}, NEW), 100) == 1
    assert log == [("put", "callers", b"more")]


def test_services_that_do_not_fit_change_nothing() -> None:
    written, made, log = maps(**OLD)
    with pytest.raises(Problem, match="services need 3 kernel entries and there are 2; narrow their port ranges"):
        written.write(Content(NEW, {}, {}), 2)
    assert log == []
    assert made["services"].content == OLD["services"]


def test_after_a_failure_half_way_the_kernel_is_read_again() -> None:
    written, made, _log = maps(**OLD)
    made["callers"].full = True
    with pytest.raises(Problem, match="took no more entries"):
        written.write(Content(NEW, NEW, NEW), 100)
    made["callers"].full = False
    written.write(Content(NEW, NEW, NEW), 100)
    assert all(each.content == NEW for each in made.values())


def test_a_table_too_small_leaves_out_what_only_costs_a_question() -> None:
    named, nobody = (500).to_bytes(4, sys.byteorder), NOBODY.to_bytes(4, sys.byteorder)
    deny, tunnel = (records.verdict_value(kind, 1) for kind in (VerdictKind.DENY, VerdictKind.ALLOW))
    content = Content({}, {b"1": nobody, b"2": named, b"3": nobody}, {b"1": tunnel, b"2": deny, b"3": deny})
    fitted, remarks = tables.fit(content, 2, 2)
    assert fitted.callers == {b"2": named, b"1": nobody}
    assert fitted.verdicts == {b"2": deny, b"3": deny}
    assert len(remarks) == 2
    assert tables.fit(content, 3, 3) == (content, [])


@pytest.mark.parametrize(
    ("netns", "age_s", "gone"), [(0, 29, False), (0, 31, True), (5, 31, False), (5, 299, False), (5, 301, True)]
)
def test_only_what_nobody_can_still_take_is_swept(netns: int, age_s: int, gone: bool) -> None:
    now = 10**12
    key = records.TUPLE.pack(netns, bytes(16), bytes(16), 1, 2, 0)
    address = ip_address("192.0.2.1")
    flow = records.Flow(1, 1, now - age_s * 10**9, address, None, 0, 0, 0, 0, 1, 1, records.Role.CAPTURED)
    assert sweep.expired(key, records.pack_flow(flow), now) is gone


def test_the_cgroup_mount_is_found_wherever_it_is() -> None:
    mounts = (
        "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /mnt/with\\040blank cgroup2 rw 0 0\ncgroup2 /later cgroup2 rw 0 0\n"
    )
    assert host.cgroup_mount(mounts) == "/mnt/with blank"
    assert host.cgroup_mount("proc /proc proc rw 0 0\n") is None


def test_the_own_cgroup_is_the_one_of_version_2() -> None:
    assert (
        host.own_cgroup("9:name=systemd:/x\n0::/system.slice/underpass.service\n") == "/system.slice/underpass.service"
    )
    with pytest.raises(LookupError, match="mount cgroup2"):
        host.own_cgroup("9:name=systemd:/x\n")


@pytest.mark.parametrize(("path", "level"), [("/", 0), ("/a", 1), ("/a/b", 2)])
def test_levels_count_as_the_kernel_does(path: str, level: int) -> None:
    assert host.cgroup_level(path) == level
