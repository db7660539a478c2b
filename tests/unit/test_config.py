"""The agent's configuration: defaults as documented, every mistake with its line."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import Capture, Config, Limits, Listener, load_config
from agent.identity import IdentityRule, Selector
from policy.fields import Invalid

SMALL = """\
host: a
trust_domain: demo.bank
identities:
  - application: ledger
    match: {cgroup: "/bank/ledger"}
"""
FULL = """\
host: a
trust_domain: demo.bank
cgroup_root: /sys/fs/cgroup/bank
state_dir: /srv/state
run_dir: /srv/run
bpffs: /srv/bpf
user: carrier
workers: 2
capture: {port: 15011, max_flows: 16}
tunnel: {listen: "[::]:15018"}
admin: {listen: "127.0.0.1:15091"}
ca: /srv/ca
leaf_lifetime: 24h
policy: /srv/policy.yaml
services: /srv/services.yaml
outcomes: /srv/outcomes.jsonl
report_open_every: 1s
limits: {connect_timeout: 500ms, handshake_timeout: 1s, drain: 0s, idle_tunnel: 5m}
identities:
  - application: ledger
    match: {cgroup: "/bank/*/ledger"}
  - application: postgres
    match: {unit: postgresql.service, uid: 113}
  - application: ledger
    match: {exe: /usr/bin/ledger, uid: ledger}
"""


def test_a_small_configuration_has_the_documented_defaults() -> None:
    assert load_config(SMALL, "x") == Config(
        host="a",
        trust_domain="demo.bank",
        identities=(IdentityRule("ledger", Selector(cgroup=("bank", "ledger"))),),
        cgroup_root=None,
        state_dir="/var/lib/underpass",
        run_dir="/run/underpass",
        bpffs="/sys/fs/bpf/underpass",
        user="underpass",
        workers=None,
        capture=Capture(port=15001, max_flows=65536),
        tunnel=Listener((ip_address("0.0.0.0"), 15008)),
        admin=Listener((ip_address("127.0.0.1"), 15090)),
        ca="/etc/underpass/ca",
        leaf_lifetime=3600.0,
        policy="/etc/underpass/policy.d",
        services="/etc/underpass/services.yaml",
        outcomes="/var/log/underpass/outcomes.jsonl",
        report_open_every=15.0,
        limits=Limits(connect_timeout=10.0, handshake_timeout=5.0, drain=30.0, idle_tunnel=60.0),
    )


def test_every_setting_is_read() -> None:
    assert load_config(FULL, "x") == Config(
        host="a",
        trust_domain="demo.bank",
        identities=(
            IdentityRule("ledger", Selector(cgroup=("bank", "*", "ledger"))),
            IdentityRule("postgres", Selector(unit="postgresql.service", uid=113)),
            IdentityRule("ledger", Selector(exe="/usr/bin/ledger", uid="ledger")),
        ),
        cgroup_root="/sys/fs/cgroup/bank",
        state_dir="/srv/state",
        run_dir="/srv/run",
        bpffs="/srv/bpf",
        user="carrier",
        workers=2,
        capture=Capture(15011, 16),
        tunnel=Listener((ip_address("::"), 15018)),
        admin=Listener((ip_address("127.0.0.1"), 15091)),
        ca="/srv/ca",
        leaf_lifetime=86400.0,
        policy="/srv/policy.yaml",
        services="/srv/services.yaml",
        outcomes="/srv/outcomes.jsonl",
        report_open_every=1.0,
        limits=Limits(0.5, 1.0, 0.0, 300.0),
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("host: a\n", "", "1: required key 'host' is missing"),
        ("host: a", "host: A", "1: host: expected a name"),
        ("demo.bank", "Demo.bank", "2: trust_domain: expected a trust domain"),
        ("demo.bank", "demo..bank", "2: trust_domain: expected a trust domain"),
        ("demo.bank", ".".join(["d" * 63] * 4), "20: application: not an identity"),
        ("/sys/fs/cgroup/bank", "sys/fs/cgroup", "3: cgroup_root: expected an absolute path"),
        ("/srv/state", "/srv/../etc", "4: state_dir: expected an absolute path"),
        ("/srv/run", "", "5: run_dir: expected a text, got nothing"),
        ("carrier", "0", "7: user: expected the name of an account"),
        ("workers: 2", "workers: 65", "8: workers: expected a whole number from 1 to 64"),
        ("workers: 2", "worker: 2", "8: unknown key 'worker'; did you mean 'workers'?"),
        ("max_flows: 16", "max_flows: 15", "9: max_flows: expected a whole number from 16 to 1048576"),
        ("port: 15011", "prot: 15011", "9: unknown key 'prot'; did you mean 'port'?"),
        ("{port: 15011, max_flows: 16}", "15011", "9: capture: expected a mapping"),
        ("15091", "15018", "10: tunnel: port 15018 is also the one of admin; give each its own"),
        ("127.0.0.1:15091", "localhost:15091", "11: listen: expected an IPv4 or IPv6 address, got 'localhost'"),
        ("24h", "25h", "13: leaf_lifetime: expected a duration from 60 to 86400 seconds"),
        ("report_open_every: 1s", "report_open_every: 1", "17: report_open_every: expected a duration such as"),
        ("500ms", "0s", "18: connect_timeout: expected a duration from 0.1 to 600 seconds"),
        ("application: ledger", "application: Ledger", "20: application: expected a name"),
        ('{cgroup: "/bank/*/ledger"}', "{}", "21: match: give at least one of cgroup, unit, uid and exe"),
        ("/bank/*/ledger", "/", "21: cgroup: expected a cgroup"),
        ("/bank/*/ledger", "/bank/led*", "21: cgroup: expected a cgroup"),
        ("/bank/*/ledger", "/bank/", "21: cgroup: expected a cgroup"),
        ("/bank/*/ledger", "bank", "21: cgroup: expected a cgroup"),
        ("/bank/*/ledger", "/bank/../x", "21: cgroup: expected a cgroup"),
        ("postgresql.service", "postgresql", "23: unit: expected a systemd unit"),
        ("postgresql.service", "a/b.service", "23: unit: expected a systemd unit"),
        ("uid: 113", "uid: 0113", "23: uid: expected a whole number"),
        ("uid: 113", "uid: -1", "23: uid: expected a whole number"),
        ("uid: 113", "uid: 4294967295", "23: uid: expected a whole number"),
        ("uid: 113", 'uid: "113"', "23: uid: expected the name of an account"),
        ("/usr/bin/ledger", "ledger", "25: exe: expected an absolute path"),
    ],
)
def test_a_mistake_is_told_with_its_line(old: str, new: str, expected: str) -> None:
    assert old in FULL
    with pytest.raises(Invalid) as caught:
        load_config(FULL.replace(old, new, 1), "x")
    assert str(caught.value.problems[0]).startswith(f"x:{expected}"), str(caught.value)


def test_a_selector_is_required() -> None:
    with pytest.raises(Invalid, match=r"^x:4: required key 'match' is missing; add it$"):
        load_config(SMALL.replace('    match: {cgroup: "/bank/ledger"}\n', ""), "x")


def test_all_mistakes_are_told_at_once() -> None:
    text = FULL.replace("/srv/state", "state").replace("workers: 2", "workers: no").replace("uid: 113", "uid: ''")
    with pytest.raises(Invalid) as caught:
        load_config(text, "x")
    assert [problem.line for problem in caught.value.problems] == [4, 8, 23]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_raises_nothing_but_invalid(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(FULL)))
    end = data.draw(st.integers(start, min(start + 8, len(FULL))))
    damage = data.draw(st.text(alphabet="ab19:-?[]{},&*!|>'\"%#\\ \n\t", max_size=5))
    try:
        load_config(FULL[:start] + damage + FULL[end:], "x")
    except Invalid as invalid:
        problems = invalid.problems
    else:
        return
    assert problems
    assert all(problem.line > 0 for problem in problems)
