"""Policy and directory together: typos are found before they let anybody in or out."""

from __future__ import annotations

import pytest

from policy.check import problems, warnings
from policy.identity import SpiffeId
from policy.load import load_directory, load_policy

DIRECTORY = load_directory(
    """
hosts: {a: {tunnel: "10.0.0.1:15008"}, b: {tunnel: "10.0.0.2:15008"}}
services:
  core-db: {application: postgres, ports: [5432], endpoints: [{host: b, address: 10.0.0.2}]}
""",
    "services.yaml",
)
OWN = [SpiffeId("demo.bank", "a", "ledger")]


def rule(text: str) -> str:
    return f"version: 1\nrules:\n  - name: it\n    {text}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('deny: {from: ["a/ledger"], to: [core-bd]}', "there is no service 'core-bd'; did you mean 'core-db'?"),
        ('allow: {from: ["a/ledger"], to: [core-db], ports: [9999]}', "none of core-db has port 9999"),
        ('allow: {from: ["a/ledger"], to: ["*"], ports: [1, 5432]}', "none of core-db has port 1"),
    ],
)
def test_what_can_mean_nothing_is_a_problem(text: str, said: str) -> None:
    [found] = problems(load_policy(rule(text), "p"), DIRECTORY)
    assert f"rule it: {said}" in str(found) or said in str(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('deny: {from: ["a/legder"], to: [core-db]}', "this host has no application 'legder'; did you mean 'ledger'?"),
        ('deny: {from: ["c/ledger"], to: [core-db]}', "there is no host 'c'"),
        ("deny: {from: [], to: [core-db]}", "denies nobody"),
    ],
)
def test_what_may_be_a_typo_is_a_warning(text: str, said: str) -> None:
    policy = load_policy(rule(text), "p")
    assert problems(policy, DIRECTORY) == []
    assert said in warnings(policy, DIRECTORY, OWN)[0]


@pytest.mark.parametrize("text", ['allow: {from: ["*/*"], to: ["*"]}', 'allow: {from: ["b/other"], to: [core-db]}'])
def test_what_is_meant_is_neither(text: str) -> None:
    policy = load_policy(rule(text), "p")
    assert problems(policy, DIRECTORY) == []
    assert warnings(policy, DIRECTORY, OWN) == []
