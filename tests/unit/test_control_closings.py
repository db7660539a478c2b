"""What the kernel tells at the end of a direct flow, as an outcome."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.control.closings import outcome_of_closing
from agent.control.sources import Texts, compiled
from agent.metrics import Metrics
from agent.outcome import Event, Path, Side, to_json
from agent.records import Closing
from policy.compile import stable_id
from policy.identity import SpiffeId

LEDGER = SpiffeId("demo.bank", "a", "ledger")
TEXTS = Texts(
    (("p", 'version: 1\nrules: [{name: r, allow: {from: ["a/ledger"], to: [core]}}]\n'),),
    (
        "s",
        'hosts: {a: {tunnel: "10.77.0.1:15008"}}\n'
        "services: {core: {application: core, ports: [9000], endpoints: [{host: a, address: 10.77.0.1}]}}\n",
    ),
)
CLOSING = Closing(
    at_ns=5_000_000_000, started_ns=2_000_000_000, connected_ns=2_000_250_000, cookie=0xAB, cgroup=9, bytes_sent=200,
    bytes_received=300, original=ip_address("10.77.0.1"), source=ip_address("10.77.0.1"), uid=1000, pid=4242,
    caller=stable_id("caller", LEDGER.uri), service=stable_id("service", "core"), rule=stable_id("rule", "r"),
    rtt_us=40, retransmits=0, original_port=9000, source_port=40000, state=5,
)  # fmt: skip


def test_a_direct_flow_is_told_like_any_other() -> None:
    known = compiled(TEXTS, "demo.bank", [LEDGER])
    outcome = outcome_of_closing(CLOSING, known.table, "a", 1.0, known.routes)
    assert (outcome.event, outcome.side, outcome.path, outcome.tls) == (Event.CLOSE, Side.SOURCE, Path.DIRECT, None)
    assert (outcome.source, outcome.destination) == (LEDGER.uri, "spiffe://demo.bank/a/core")
    assert (outcome.service, outcome.verdict, outcome.rule, outcome.reason) == ("core", "allow", "r", "allowed")
    assert (outcome.client, outcome.server) == ("10.77.0.1:40000", "10.77.0.1:9000")
    assert (outcome.bytes_sent, outcome.bytes_received, outcome.rtt_us) == (200, 300, 40)
    assert (outcome.connect_ms, outcome.duration_ms) == (0.25, 3000.0)
    assert outcome.connection == "00000000000000ab0000000077359400"
    assert (outcome.pid, outcome.uid, outcome.close_reason) == (4242, 1000, "ended")


@pytest.mark.parametrize(
    ("state", "reason"),
    [(1, "reset"), (2, "connect_failed"), (4, "reset"), (5, "ended"), (8, "reset"), (9, "ended"), (11, "ended")],
)
def test_the_state_it_ended_from_tells_how(state: int, reason: str) -> None:
    assert outcome_of_closing(replace(CLOSING, state=state), None, "a", 1.0).close_reason == reason


def test_what_is_no_longer_known_is_a_number_and_never_left_out() -> None:
    outcome = outcome_of_closing(replace(CLOSING, caller=1, service=2, rule=3, connected_ns=0), None, "a", 1.0)
    assert (outcome.source, outcome.service, outcome.rule) == ("caller-00000001", "service-00000002", "rule-00000003")
    assert outcome.connect_ms is None


def test_it_is_counted_with_its_path() -> None:
    metrics = Metrics()
    metrics.observe(to_json(outcome_of_closing(CLOSING, None, "a", 1.0)))
    (line,) = [line for line in metrics.render().decode().splitlines() if line.startswith("underpass_flows_total{")]
    assert 'path="direct"' in line
