"""Who a process is: exactly one application, or nobody."""

from __future__ import annotations

import pytest

from agent.identity import Caller, ExeFile, IdentityRule, Selector, Unidentified, identify, needs_exe, with_uids
from policy.identity import SpiffeId

BATCH_FILE, OTHER_FILE = ExeFile(8, 1001), ExeFile(8, 1002)
FILES = {"/usr/bin/batch": BATCH_FILE}
BATCH = Selector(exe="/usr/bin/batch")


def one(selector: Selector, caller: Caller) -> bool:
    """Whether a rule with this selector identifies the caller."""
    found = identify([IdentityRule("app", selector)], caller, "a", "demo.bank", FILES)
    assert found == SpiffeId("demo.bank", "a", "app") or isinstance(found, Unidentified)
    return isinstance(found, SpiffeId)


@pytest.mark.parametrize(
    ("wanted", "cgroup", "matches"),
    [
        ("bank/ledger", "/bank/ledger", True),
        ("bank/ledger", "/bank/ledger/worker/1", True),
        ("bank/ledger", "/bank/ledger2", False),
        ("bank/ledger", "/bank", False),
        ("bank/ledger", "/x/bank/ledger", False),
        ("bank/*", "/bank/anything/below", True),
        ("bank/*", "/bank", False),
        ("*/ledger", "/bank/ledger", True),
        ("*/ledger", "/bank/x/ledger", False),
        ("*/ledger", "/../ledger", False),
        ("bank/ledger", "bank/ledger", False),
        ("bank/ledger", "/bank//ledger", False),
        ("bank/ledger", "/bank/ledger/../batch", False),
        ("bank", "/", False),
        ("*", "/", False),
        ("*", "", False),
    ],
)
def test_a_cgroup_is_that_one_and_everything_below_it(wanted: str, cgroup: str, matches: bool) -> None:
    assert one(Selector(cgroup=tuple(wanted.split("/"))), Caller(cgroup, 0)) is matches


@pytest.mark.parametrize(
    ("cgroup", "matches"),
    [
        ("/system.slice/postgresql.service", True),
        ("/system.slice/postgresql.service/child", True),
        ("/system.slice/system-postgresql.slice/postgresql.service", True),
        ("/postgresql.service", True),
        ("/system.slice/postgresql.service.d", False),
        ("/system.slice/xpostgresql.service", False),
        ("/system.slice/docker.service/postgresql.service", False),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/postgresql.service", False),
        ("/user.slice/session-1.scope/postgresql.service", False),
        ("/docker/0123/system.slice/postgresql.service", False),
        ("/bank/postgresql.service", False),
        ("/", False),
    ],
)
def test_a_unit_is_only_what_systemd_itself_made(cgroup: str, matches: bool) -> None:
    assert one(Selector(unit="postgresql.service"), Caller(cgroup, 0)) is matches


@pytest.mark.parametrize(
    ("selector", "caller", "matches"),
    [
        (Selector(uid=113), Caller("/x", 113), True),
        (Selector(uid=113), Caller("/x", 0), False),
        (Selector(uid="postgres"), Caller("/x", 113), False),
        (BATCH, Caller("/x", 0, BATCH_FILE), True),
        (BATCH, Caller("/x", 0, OTHER_FILE), False),
        (BATCH, Caller("/x", 0, ExeFile(9, 1001)), False),
        (BATCH, Caller("/x", 0, None), False),
        (Selector(exe="/not/installed"), Caller("/x", 0, BATCH_FILE), False),
        (Selector(exe="/not/installed"), Caller("/x", 0, None), False),
        (Selector(cgroup=("bank",), uid=113), Caller("/bank", 113), True),
        (Selector(cgroup=("bank",), uid=113), Caller("/bank", 0), False),
        (Selector(cgroup=("bank",), uid=113), Caller("/x", 113), False),
        (Selector(uid=113, exe="/usr/bin/batch"), Caller("/x", 0, BATCH_FILE), False),
        (Selector(), Caller("/x", 0), False),
    ],
)
def test_everything_that_a_selector_gives_has_to_match(selector: Selector, caller: Caller, matches: bool) -> None:
    assert one(selector, caller) is matches


def test_several_rules_may_name_the_same_application() -> None:
    rules = [IdentityRule("app", Selector(uid=1)), IdentityRule("app", Selector(cgroup=("x",)))]
    assert identify(rules, Caller("/x", 1), "a", "demo.bank") == SpiffeId("demo.bank", "a", "app")


def test_a_caller_that_fits_two_applications_is_nobody() -> None:
    rules = [IdentityRule("ledger", Selector(cgroup=("bank", "ledger"))), IdentityRule("batch", Selector(uid=7))]
    found = identify(rules, Caller("/bank/ledger", 7), "a", "demo.bank")
    assert found == Unidentified("ambiguous: cgroup '/bank/ledger', uid 7 fits ledger and batch")


def test_a_caller_that_fits_no_rule_is_nobody() -> None:
    assert identify([], Caller("/x", 7), "a", "demo.bank") == Unidentified(
        "no identity rule matches cgroup '/x', uid 7; add one"
    )


def test_an_unreadable_executable_never_widens_an_identity() -> None:
    """With its executable known this caller would be refused as ambiguous, so without it as well."""
    rules = [IdentityRule("ledger", Selector(uid=7)), IdentityRule("batch", BATCH)]
    for exe in (BATCH_FILE, None):
        found = identify(rules, Caller("/x", 7, exe), "a", "demo.bank", FILES)
        assert isinstance(found, Unidentified)
        assert found.reason.startswith("ambiguous")
    assert identify(rules, Caller("/x", 7, OTHER_FILE), "a", "demo.bank", FILES) == SpiffeId("demo.bank", "a", "ledger")


def test_an_unreadable_executable_is_told() -> None:
    found = identify([IdentityRule("batch", BATCH)], Caller("/x", 7), "a", "demo.bank", FILES)
    assert isinstance(found, Unidentified)
    assert found.reason.startswith("executable unknown: batch asks for one")


def test_executables_are_needed_only_when_a_rule_asks() -> None:
    assert needs_exe([IdentityRule("a", Selector(uid=1)), IdentityRule("b", BATCH)])
    assert not needs_exe([IdentityRule("a", Selector(uid=1))])


def test_user_names_become_numbers_and_unknown_ones_match_nobody() -> None:
    rules = [IdentityRule("a", Selector(uid="x")), IdentityRule("b", Selector(uid="gone")), IdentityRule("c", BATCH)]
    assert with_uids(rules, {"x": 113}) == (IdentityRule("a", Selector(uid=113)), *rules[1:])
