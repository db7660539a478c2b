"""The kernel's table never says anything that decide() would not say."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import compile as compiler
from policy.compile import NOBODY, UNKNOWN, CapturedAddress, KernelVerdict, VerdictKind, compile_table, stable_id
from policy.evaluate import decide
from policy.fields import Invalid
from policy.identity import SpiffeId
from policy.model import (
    Directory,
    Effect,
    Endpoint,
    Pattern,
    Policy,
    PortRange,
    Request,
    Rule,
    SameNode,
    Service,
    Verdict,
    parse_pattern,
)

OURS = "demo.bank"
LEDGER = SpiffeId(OURS, "a", "ledger")
BATCH = SpiffeId(OURS, "a", "batch")
STRANGER = SpiffeId("other.bank", "a", "ledger")
B, C = Endpoint("b", ip_address("10.77.0.2")), Endpoint("c", ip_address("fd77::3"))
DB = Service("db", "postgres", (PortRange(5432, 5432), PortRange(90, 92)), (B, C), (ip_address("10.99.0.1"),))
WEB = Service("web", "nginx", (PortRange(443, 443),), (B,))
DIRECTORY = Directory({}, {"db": DB, "web": WEB})


def rule(name: str, effect: Effect, source: str, service: str, ports: tuple[PortRange, ...] | None = None) -> Rule:
    return Rule(name, effect, (parse_pattern(source),), (service,), ports)


def policy(*rules: Rule) -> Policy:
    return Policy(1, SameNode.DIRECT, rules)


def verdict(some: Policy | None, service: str, caller: SpiffeId = LEDGER) -> KernelVerdict:
    table = compile_table(some, OURS, DIRECTORY, [LEDGER, BATCH, STRANGER])
    return table.verdicts[stable_id("caller", caller.uri), stable_id("service", service)]


def test_ids_are_the_same_after_a_restart_and_on_every_host() -> None:
    # Pinned maps hold these numbers: whoever changes the function has to change this line, and to migrate the maps.
    assert stable_id("rule", "default") == 0xAAF077E2
    assert stable_id("service", "x") != stable_id("rule", "x")


def test_every_address_of_a_service_is_captured_at_every_port() -> None:
    db = stable_id("service", "db")
    found = compile_table(None, OURS, DIRECTORY, []).services
    assert [entry for entry in found if entry.service_id == db] == [
        CapturedAddress(address, port, db, answers)
        for address, answers in (
            (B.address, SpiffeId(OURS, "b", "postgres")),
            (C.address, SpiffeId(OURS, "c", "postgres")),
            (ip_address("10.99.0.1"), None),
        )
        for port in (5432, 90, 91, 92)
    ]
    assert [entry for entry in found if entry.service_id != db] == [
        CapturedAddress(B.address, 443, stable_id("service", "web"), SpiffeId(OURS, "b", "nginx"))
    ]


def test_nobody_has_to_answer_at_a_port_that_is_translated() -> None:
    moved = Service("moved", "x", (PortRange(80, 80),), (Endpoint("b", B.address, 8080), Endpoint("c", C.address, 80)))
    found = compile_table(None, OURS, Directory({}, {"moved": moved}), []).services
    assert [each.answers for each in found] == [None, SpiffeId(OURS, "c", "x")]


@pytest.mark.parametrize("same_node", SameNode)
def test_the_table_says_how_neighbours_talk(same_node: SameNode) -> None:
    assert compile_table(Policy(1, same_node, ()), OURS, DIRECTORY, []).same_node is same_node


def test_names_are_kept_for_every_id() -> None:
    table = compile_table(policy(rule("r", Effect.ALLOW, "*/*", "web")), OURS, DIRECTORY, [LEDGER, BATCH, LEDGER])
    assert table.callers == {stable_id("caller", caller.uri): caller for caller in (LEDGER, BATCH)}
    assert table.service_names == {stable_id("service", name): name for name in ("db", "web")}
    assert table.rules == {stable_id("rule", name): name for name in ("default", "r")}
    assert len(table.verdicts) == 3 * 2


@pytest.mark.parametrize(
    ("some", "service", "kind", "name"),
    [
        (None, "db", VerdictKind.DENY, "default"),
        (policy(), "db", VerdictKind.DENY, "default"),
        (policy(rule("r", Effect.ALLOW, "a/ledger", "db")), "db", VerdictKind.ALLOW, "r"),
        (policy(rule("r", Effect.ALLOW, "a/ledger", "db")), "web", VerdictKind.DENY, "default"),
        (policy(rule("r", Effect.DENY, "a/*", "*")), "db", VerdictKind.DENY, "r"),
        (policy(rule("r", Effect.ALLOW, "a/ledger", "db", (PortRange(90, 5432),))), "db", VerdictKind.ALLOW, "r"),
        (policy(rule("r", Effect.ALLOW, "a/ledger", "db", (PortRange(1, 91),))), "db", VerdictKind.ASK, None),
        (policy(rule("r", Effect.ALLOW, "a/ledger", "db", (PortRange(92, 92),))), "db", VerdictKind.ASK, None),
        (policy(rule("r", Effect.DENY, "a/ledger", "db", (PortRange(92, 92),))), "db", VerdictKind.ASK, None),
        (
            policy(
                rule("low", Effect.ALLOW, "*/*", "*", (PortRange(1, 99),)),
                rule("high", Effect.ALLOW, "*/*", "*", (PortRange(100, 9999),)),
            ),
            "db",
            VerdictKind.ASK,
            None,
        ),
    ],
)
def test_a_verdict_is_worked_out_only_where_all_ports_agree(
    some: Policy | None, service: str, kind: VerdictKind, name: str | None
) -> None:
    assert verdict(some, service) == KernelVerdict(kind, stable_id("rule", name) if name else UNKNOWN)


@pytest.mark.parametrize(("low", "high"), [(1, 91), (91, 91), (92, 99), (90, 90), (92, 92)])
def test_a_rule_that_begins_or_ends_within_a_range_of_ports_leaves_it_to_the_proxy(low: int, high: int) -> None:
    span = Directory({}, {"span": Service("span", "x", (PortRange(90, 92),), (B,))})
    some = policy(rule("r", Effect.ALLOW, "a/ledger", "span", (PortRange(low, high),)))
    table = compile_table(some, OURS, span, [LEDGER])
    assert table.verdicts[stable_id("caller", LEDGER.uri), stable_id("service", "span")].kind is VerdictKind.ASK


def test_nobody_and_strangers_are_denied_everywhere_by_default() -> None:
    table = compile_table(policy(rule("all", Effect.ALLOW, "*/*", "*")), OURS, DIRECTORY, [STRANGER])
    denied = KernelVerdict(VerdictKind.DENY, stable_id("rule", "default"))
    assert all(found == denied for found in table.verdicts.values())
    assert {caller for caller, _ in table.verdicts} == {NOBODY, stable_id("caller", STRANGER.uri)}


def test_two_names_with_one_id_are_refused() -> None:
    assert stable_id("service", "s24202") == stable_id("service", "s72181")  # found by trying
    twins = {name: Service(name, "x", WEB.ports, (B,)) for name in ("s24202", "s72181")}
    with pytest.raises(Invalid, match=r"^service: 's72181' and 's24202' share the id 2730370968; rename one$"):
        compile_table(None, OURS, Directory({}, twins), [])


@pytest.mark.parametrize("number", [UNKNOWN, NOBODY])
def test_a_name_that_hashes_to_a_reserved_id_is_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "stable_id", lambda kind, name: number if kind == "caller" else hash(name))
    with pytest.raises(Invalid, match=f"hashes to the reserved id {number}; rename it"):
        compile_table(None, OURS, DIRECTORY, [LEDGER])


def test_an_identity_that_would_be_too_long_is_refused() -> None:
    domain = ".".join(["d" * 63] * 3)
    long = Service("s", "p" * 63, WEB.ports, (Endpoint("h" * 63, B.address),))
    with pytest.raises(Invalid, match="not an identity"):
        compile_table(None, domain, Directory({}, {"s": long}), [])


PORTS = st.integers(1, 12)
RANGES = st.builds(lambda a, b: PortRange(min(a, b), max(a, b)), PORTS, PORTS)
PATTERNS = st.builds(Pattern, st.sampled_from("a*"), st.sampled_from(["ledger", "*"]))
RULES = st.builds(
    Rule,
    name=st.uuids().map(str),
    effect=st.sampled_from(list(Effect)),
    sources=st.lists(PATTERNS, min_size=1, max_size=2).map(tuple),
    services=st.sampled_from([("*",), ("s",), ("t", "s")]),
    ports=st.none() | st.lists(RANGES, max_size=2).map(tuple),
)
SERVICES = st.builds(
    Service,
    name=st.sampled_from("st"),
    application=st.just("server"),
    ports=st.lists(RANGES, min_size=1, max_size=3).map(tuple),
    endpoints=st.sampled_from([(B,), (B, C)]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(RULES, min_size=1, max_size=4).map(lambda some: policy(*some)), st.lists(SERVICES, min_size=1, max_size=2)
)
def test_a_kernel_verdict_is_ask_or_what_decide_says(some: Policy, services: list[Service]) -> None:
    directory = Directory({}, {service.name: service for service in services})
    table = compile_table(some, OURS, directory, [LEDGER, BATCH, STRANGER])
    for (caller_id, service_id), found in table.verdicts.items():
        service = directory.services[table.service_names[service_id]]
        for endpoint in service.endpoints:
            for port in (port for ports in service.ports for port in range(ports.low, ports.high + 1)):
                destination = service.identity(endpoint, OURS)
                decision = decide(some, OURS, Request(table.callers.get(caller_id), destination, service.name, port))
                if found.kind is not VerdictKind.ASK:
                    assert (found.kind is VerdictKind.ALLOW) is (decision.verdict is Verdict.ALLOW)
                    assert found.rule_id in (UNKNOWN, stable_id("rule", decision.rule))
                if found.kind is VerdictKind.DENY:
                    assert table.rules[found.rule_id] == decision.rule
