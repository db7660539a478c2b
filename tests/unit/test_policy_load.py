"""Policy and services files: every form that is right, and every mistake with its line."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policy
from policy.fields import Invalid
from policy.load import load_directory, load_policies, load_policy
from policy.model import Effect, Endpoint, MeshHost, Pattern, Policy, PortRange, Rule, SameNode, Service

POLICY = """\
version: 1
same_node: mtls
rules:
  - name: ledger-reads-core
    allow:
      from: ["a/ledger", "*/*"]
      to: [core-db]
      ports: [5432, "9000-9010"]
  - name: nobody
    deny: {from: [], to: ["*"], ports: []}
"""
SERVICES = """\
hosts:
  b: {tunnel: "10.77.0.2:15008"}
  c: {tunnel: "[fd77::3]:15008"}
services:
  core-db:
    application: postgres
    ports: [5432]
    endpoints:
      - {host: b, address: 10.77.0.2}
      - {host: c, address: fd77::3, port: 6432}
    addresses: [10.99.0.1]
  bulk:
    application: mover
    ports: [80, "9000-9010"]
    endpoints: [{host: b, address: 10.77.0.2}]
"""


def messages(text: str, old: str, new: str) -> list[str]:
    """What loading says after one edit of a good file."""
    assert old in text
    load = load_policy if text is POLICY else load_directory
    with pytest.raises(Invalid) as caught:
        load(text.replace(old, new, 1), "x")
    return [str(problem) for problem in caught.value.problems]


def test_a_policy_is_read_whole() -> None:
    assert load_policy(POLICY, "x") == Policy(
        version=1,
        same_node=SameNode.MTLS,
        rules=(
            Rule(
                "ledger-reads-core",
                Effect.ALLOW,
                (Pattern("a", "ledger"), Pattern("*", "*")),
                ("core-db",),
                (PortRange(5432, 5432), PortRange(9000, 9010)),
            ),
            Rule("nobody", Effect.DENY, (), ("*",), ()),
        ),
    )


def test_ports_left_out_are_every_port_and_same_node_left_out_is_direct() -> None:
    found = load_policy("version: 1\nrules:\n  - {name: x, allow: {from: [a/b], to: [c]}}\n", "x")
    assert found.rules[0].ports is None
    assert found.same_node is SameNode.DIRECT


def test_the_shipped_default_allows_nothing() -> None:
    text = Path(policy.__path__[0], "default.yaml").read_text(encoding="utf-8")
    assert load_policy(text, "default.yaml") == Policy(1, SameNode.DIRECT, ())


def test_no_file_at_all_is_a_policy_that_allows_nothing() -> None:
    assert load_policies([]).rules == ()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1", "version: 2", ["x:1: version: expected the number 1 in plain decimal digits, got '2'"]),
        ("version: 1\n", "", ["x:1: required key 'version' is missing; add it"]),
        ("mtls", "tls", ["x:2: same_node: expected direct or mtls, got 'tls'"]),
        ("allow:", "alow:", ["x:4: a rule needs exactly one of allow", "x:5: unknown key 'alow'; did you mean"]),
        ("    deny", "    allow: {from: [], to: []}\n    deny", ["x:9: a rule needs exactly one of allow and deny"]),
        ("name: nobody", "name: ledger-reads-core", ["x:9: rule 'ledger-reads-core' exists already in x:4"]),
        ("name: nobody", "name: default", ["x:9: rule name 'default' is reserved"]),
        ("a/ledger", "a/led*", ["x:6: from: expected HOST/APPLICATION"]),
        ("a/ledger", "ledger", ["x:6: from: expected HOST/APPLICATION"]),
        ("a/ledger", "spiffe://demo.bank/a/ledger", ["x:6: from: expected HOST/APPLICATION"]),
        ("a/ledger", "a/ledger/", ["x:6: from: expected HOST/APPLICATION"]),
        ("[core-db]", "core-db", ["x:7: to: expected a list, got 'core-db'; write [] for an empty one"]),
        ("      to: [core-db]\n", "", ["x:5: required key 'to' is missing"]),
        ("5432, ", "0600, ", ["x:8: ports: expected a port"]),
        ('[5432, "9000-9010"]', "", ["x:8: ports: expected a list, got nothing"]),
    ],
)
def test_a_mistake_in_a_policy_is_told_with_its_line(old: str, new: str, expected: list[str]) -> None:
    found = messages(POLICY, old, new)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


RULE = "version: 1\nrules:\n  - {name: %s, allow: {from: [], to: []}}\n"


def test_files_are_merged_in_the_order_given() -> None:
    found = load_policies([("1", RULE % "x"), ("2", "same_node: mtls\n" + RULE % "y")])
    assert [rule.name for rule in found.rules] == ["x", "y"]
    assert found.same_node is SameNode.MTLS


def test_problems_of_all_files_are_told_together_also_between_files() -> None:
    files = [("1", "same_node: mtls\n" + RULE % "x"), ("2", "same_node: direct\n" + RULE % "x"), ("3", "rules: []")]
    with pytest.raises(Invalid) as caught:
        load_policies(files)
    assert [str(problem) for problem in caught.value.problems] == [
        "2:1: same_node differs from 1:1; state it in one file",
        "2:4: rule 'x' exists already in 1:4; rename one",
        "3:1: required key 'version' is missing; add it",
    ]


def test_a_directory_is_read_whole() -> None:
    found = load_directory(SERVICES, "x")
    assert found.hosts["c"] == MeshHost("c", (ip_address("fd77::3"), 15008))
    assert found.services["core-db"] == Service(
        name="core-db",
        application="postgres",
        ports=(PortRange(5432, 5432),),
        endpoints=(Endpoint("b", ip_address("10.77.0.2")), Endpoint("c", ip_address("fd77::3"), 6432)),
        addresses=(ip_address("10.99.0.1"),),
    )
    assert found.services["bulk"].ports == (PortRange(80, 80), PortRange(9000, 9010))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  b: {", "  B: {", ["x:2: hosts: expected a name", "x:9: host 'b' is not", "x:15: host 'b' is not"]),
        ("10.77.0.2:15008", "b:15008", ["x:2: tunnel: expected an IPv4 or IPv6 address"]),
        ("10.77.0.2:15008", "0.0.0.0:15008", ["x:2: tunnel: expected the address at which"]),
        ("core-db:", "core.db:", ["x:5: services: expected a name"]),
        ("application: postgres", "application: Postgres", ["x:6: application: expected a name"]),
        ("ports: [5432]", "ports: []", ["x:7: ports: expected at least 1, got 0"]),
        ("[5432]", "[0600]", ["x:7: ports: expected a port"]),
        ("[5432]", "[5432, 5433]", ["x:10: port: only a service with exactly one port"]),
        ("[5432]", '["5432-5433"]', ["x:10: port: only a service with exactly one port"]),
        ('[80, "9000-9010"]', '["9005-9020", "9000-9010"]', ["x:14: ports: the ranges of one service overlap"]),
        ('[80, "9000-9010"]', '["9010-9020", "9000-9010"]', ["x:14: ports: the ranges of one service overlap"]),
        ("[{host: b, address: 10.77.0.2}]", "[]", ["x:15: endpoints: expected at least 1, got 0"]),
        ("host: b, address: 10.77.0.2", "host: d, address: 10.77.0.2", ["x:9: host 'd' is not listed under hosts"]),
        ("address: 10.77.0.2", "address: 127.0.0.1", ["x:9: address: expected an address that other hosts can dial"]),
        ("address: 10.77.0.2", "address: 224.0.0.1", ["x:9: address: expected an address that other hosts can dial"]),
        ("[10.99.0.1]", '["::"]', ["x:11: addresses: expected an address that other hosts can dial"]),
        ("[10.99.0.1]", "[10.77.0.2]", ["x:5: address 10.77.0.2 is listed twice in service 'core-db'"]),
        ("address: fd77::3", "address: 10.77.0.2", ["x:5: address 10.77.0.2 is listed twice"]),
        ("80, ", "5432, ", ["x:12: 10.77.0.2 port 5432 belongs to 'core-db' and 'bulk'; give each its own"]),
        ("80, ", '"1-6000", ', ["x:5: 10.77.0.2 port 5432 belongs to 'bulk' and 'core-db'; give each its own"]),
        ("9000-9010", "9000-30000", ["x:4: services capture 21005 (address, port) pairs, more than 16384"]),
    ],
)
def test_a_mistake_in_a_directory_is_told_with_its_line(old: str, new: str, expected: list[str]) -> None:
    found = messages(SERVICES, old, new)
    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_the_whole_table_may_be_used_and_not_one_entry_more() -> None:
    text = SERVICES.replace("9000-9010", "9000-25379")  # 3 of core-db, 80, and 16380
    assert len(load_directory(text, "x").services) == 2
    with pytest.raises(Invalid, match="capture 16385 "):
        load_directory(text.replace("25379", "25380"), "x")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_raises_nothing_but_invalid(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([POLICY, SERVICES]))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 8, len(text))))
    damage = data.draw(st.text(alphabet="ab19:-?[]{},&*!|>'\"%#\\ \n\t", max_size=5))
    for load in (load_policy, load_directory):
        try:
            load(text[:start] + damage + text[end:], "x")
        except Invalid as invalid:
            problems = invalid.problems
        else:
            continue
        assert problems
        assert all(problem.line > 0 for problem in problems)
