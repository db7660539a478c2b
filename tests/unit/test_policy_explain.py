"""What people are told about a decision is what was decided."""

from __future__ import annotations

import pytest

from policy.explain import explain
from policy.identity import SpiffeId
from policy.load import load_policy
from policy.model import Policy, Request

OURS = "demo.bank"
LEDGER = SpiffeId(OURS, "a", "ledger")
POSTGRES = SpiffeId(OURS, "b", "postgres")
POLICY = """\
version: 1
rules:
  - {name: reads, allow: {from: [a/ledger], to: [db], ports: [5432]}}
  - {name: wide, allow: {from: ["*/*"], to: ["*"]}}
  - {name: no-admin, deny: {from: ["a/*"], to: [db], ports: [22, 90-99]}}
  - {name: no-ledger, deny: {from: [a/ledger], to: [db], ports: [22]}}
"""


def told(port: int, source: SpiffeId | None = LEDGER, policy: str = POLICY) -> list[str]:
    return explain(load_policy(policy, "x"), OURS, Request(source, POSTGRES, "db", port))


def test_an_allowed_request_names_the_rule_and_why_the_others_do_not_count() -> None:
    assert told(5432) == [
        "allow: a/ledger to db port 5432 on b/postgres: rule reads allows it",
        "rule reads (allow) matches and decides",
        "rule wide (allow) matches, but rule reads comes first",
        "rule no-admin (deny) does not match: port 5432 is not in [22, 90-99]",
        "rule no-ledger (deny) does not match: port 5432 is not in [22]",
    ]


def test_a_denied_request_shows_the_allow_rules_in_the_shadow() -> None:
    assert told(22) == [
        "deny: a/ledger to db port 22 on b/postgres: rule no-admin denies it",
        "rule reads (allow) does not match: port 22 is not in [5432]",
        "rule wide (allow) matches, but is shadowed by deny rule no-admin",
        "rule no-admin (deny) matches and decides",
        "rule no-ledger (deny) matches, but rule no-admin comes first",
    ]


def test_a_rule_that_misses_in_several_ways_tells_all_of_them() -> None:
    policy = "version: 1\nrules:\n  - {name: r, allow: {from: [c/x], to: [], ports: []}}\n"
    assert told(1, policy=policy) == [
        "deny: a/ledger to db port 1 on b/postgres: no rule matches, and what no rule allows is denied",
        "rule r (allow) does not match: source spiffe://demo.bank/a/ledger is not in [c/x] of demo.bank; "
        "service db is not in []; port 1 is not in []",
    ]


def test_a_caller_without_identity_matches_no_rule() -> None:
    first, *rules = told(5432, source=None)
    assert first.startswith("deny: unidentified caller to db port 5432 on b/postgres: the caller has no identity; add")
    assert all("source a caller without identity is not in" in line for line in rules)


@pytest.mark.parametrize(
    ("policy", "destination", "reason"),
    [
        (None, POSTGRES, "no policy is loaded; see why the last reload failed"),
        (load_policy(POLICY, "x"), SpiffeId("other.bank", "b", "x"), "must both be of trust domain demo.bank"),
    ],
)
def test_refused_before_any_rule_is_asked(policy: Policy | None, destination: SpiffeId, reason: str) -> None:
    first, *rules = explain(policy, OURS, Request(LEDGER, destination, "db", 5432))
    assert first.endswith(reason)
    assert not any("decides" in line for line in rules)
