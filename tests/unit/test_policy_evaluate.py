"""Decisions: deny by default, deny wins, nobody and strangers get nothing."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.evaluate import decide
from policy.identity import SpiffeId
from policy.model import (
    Decision,
    Effect,
    Pattern,
    Policy,
    PortRange,
    Reason,
    Request,
    Rule,
    SameNode,
    Verdict,
    parse_pattern,
)

OURS = "demo.bank"
LEDGER = SpiffeId(OURS, "a", "ledger")
POSTGRES = SpiffeId(OURS, "b", "postgres")
ASKED = Request(LEDGER, POSTGRES, "core-db", 5432)


def rule(name: str, effect: Effect, source: str = "*/*", service: str = "*", ports: str | None = None) -> Rule:
    ranges = None if ports is None else tuple(PortRange(*map(int, part.split("-"))) for part in ports.split())
    return Rule(name, effect, (parse_pattern(source),), (service,), ranges)


def policy(*rules: Rule) -> Policy:
    return Policy(1, SameNode.DIRECT, rules)


ALLOW_ALL = rule("all", Effect.ALLOW)


@pytest.mark.parametrize(
    ("given_policy", "request_", "expected"),
    [
        (None, ASKED, (Verdict.DENY, "default", Reason.NO_POLICY)),
        (policy(), ASKED, (Verdict.DENY, "default", Reason.NO_MATCHING_RULE)),
        (policy(ALLOW_ALL), ASKED, (Verdict.ALLOW, "all", Reason.ALLOWED)),
        (
            policy(ALLOW_ALL),
            Request(None, POSTGRES, "core-db", 5432),
            (Verdict.DENY, "default", Reason.NO_IDENTITY),
        ),
        (
            policy(ALLOW_ALL),
            Request(SpiffeId("other.bank", "a", "ledger"), POSTGRES, "core-db", 5432),
            (Verdict.DENY, "default", Reason.FOREIGN_TRUST_DOMAIN),
        ),
        (
            policy(ALLOW_ALL),
            Request(LEDGER, SpiffeId("other.bank", "b", "postgres"), "core-db", 5432),
            (Verdict.DENY, "default", Reason.FOREIGN_TRUST_DOMAIN),
        ),
        (
            policy(ALLOW_ALL, rule("not-a", Effect.DENY, "a/*"), rule("not-ledger", Effect.DENY, "*/ledger")),
            ASKED,
            (Verdict.DENY, "not-a", Reason.DENIED_BY_RULE),
        ),
        (
            policy(rule("no", Effect.ALLOW, "b/ledger"), rule("first", Effect.ALLOW, "a/ledger"), ALLOW_ALL),
            ASKED,
            (Verdict.ALLOW, "first", Reason.ALLOWED),
        ),
    ],
)
def test_a_request_is_decided(
    given_policy: Policy | None, request_: Request, expected: tuple[Verdict, str, Reason]
) -> None:
    assert decide(given_policy, OURS, request_) == Decision(*expected)


@pytest.mark.parametrize(
    ("source", "service", "ports", "allowed"),
    [
        ("a/ledger", "core-db", "5432-5432", True),
        ("a/*", "*", None, True),
        ("*/ledger", "core-db", "1-2 5000-5432", True),
        ("b/ledger", "core-db", None, False),
        ("a/ledge", "core-db", None, False),
        ("a/ledger", "core", None, False),
        ("a/ledger", "core-db", "5433-65535", False),
        ("a/ledger", "core-db", "", False),
    ],
)
def test_a_rule_matches_whole_names_and_listed_ports(
    source: str, service: str, ports: str | None, allowed: bool
) -> None:
    decision = decide(policy(rule("x", Effect.ALLOW, source, service, ports)), OURS, ASKED)
    assert (decision.verdict is Verdict.ALLOW) is allowed


@pytest.mark.parametrize(("sources", "services"), [((), ("*",)), ((Pattern("*", "*"),), ())])
def test_an_empty_list_matches_nothing(sources: tuple[Pattern, ...], services: tuple[str, ...]) -> None:
    assert decide(policy(Rule("x", Effect.ALLOW, sources, services)), OURS, ASKED).reason is Reason.NO_MATCHING_RULE


def test_a_pattern_never_reaches_into_another_trust_domain() -> None:
    assert Pattern("*", "*").matches(LEDGER, OURS)
    assert not Pattern("*", "*").matches(LEDGER, "other.bank")
    assert not Pattern("a", "ledger").matches(LEDGER, "bank")


@pytest.mark.parametrize("text", ["", "a", "a/", "/a", "a/b/c", "a/b*", "A/b", "a/**", "a /b", "spiffe://a/b"])
def test_a_pattern_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected HOST/APPLICATION"):
        parse_pattern(text)


PATTERNS = st.builds(Pattern, st.sampled_from("ab*"), st.sampled_from(["ledger", "*"]))


def rules(effects: list[Effect]) -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        name=st.uuids().map(str),
        effect=st.sampled_from(effects),
        sources=st.lists(PATTERNS, max_size=2).map(tuple),
        services=st.sampled_from([("*",), ("core-db",), ("other",), ()]),
        ports=st.sampled_from([None, (), (PortRange(1, 5431),), (PortRange(5432, 6000),)]),
    )


ANY_RULES = st.lists(rules(list(Effect)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(ANY_RULES, st.randoms(use_true_random=False))
def test_the_order_of_rules_never_changes_a_verdict(some: list[Rule], random: Random) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)
    before, after = decide(policy(*some), OURS, ASKED), decide(policy(*shuffled), OURS, ASKED)
    assert (before.verdict, before.reason) == (after.verdict, after.reason)


@settings(max_examples=150, deadline=None)
@given(ANY_RULES, st.integers(0, 6))
def test_a_matching_deny_wins_wherever_it_stands(some: list[Rule], place: int) -> None:
    deny = rule("stop", Effect.DENY, "a/ledger", "core-db", "5432-5432")
    assert decide(policy(*some[:place], deny, *some[place:]), OURS, ASKED).verdict is Verdict.DENY


@settings(max_examples=100, deadline=None)
@given(st.lists(rules([Effect.DENY]), max_size=6))
def test_without_an_allow_rule_nothing_is_allowed(some: list[Rule]) -> None:
    assert decide(policy(*some), OURS, ASKED).verdict is Verdict.DENY


@settings(max_examples=100, deadline=None)
@given(ANY_RULES, rules([Effect.DENY]))
def test_one_more_deny_never_allows_more(some: list[Rule], deny: Rule) -> None:
    if decide(policy(*some), OURS, ASKED).verdict is Verdict.DENY:
        assert decide(policy(*some, deny), OURS, ASKED).verdict is Verdict.DENY
