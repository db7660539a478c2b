"""What control is made of: sources, last good, leaves, audit writer, metrics, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.audit.writer import Writer
from agent.certs.authority import CertError, Leaf, make_intermediate, make_leaf, make_root
from agent.control import lastgood, sources
from agent.control.leaves import RETRY_S, Leaves
from agent.metrics import Metrics
from agent.outcome import Event, Outcome, Side, to_json
from policy.fields import Invalid
from policy.identity import SpiffeId

NOW = 1_800_000_000.0
LEDGER = SpiffeId("demo.bank", "a", "ledger")
SERVICES = 'hosts: {b: {tunnel: "10.0.0.2:15008"}}\nservices: {}\n'


def test_a_directory_of_policies_is_read_by_name_without_leftovers(tmp_path: Path) -> None:
    for name in ("20-b.yaml", "10-a.yaml", ".hidden.yaml", "10-a.yaml.dpkg-old", "readme.txt"):
        (tmp_path / name).write_text("version: 1\nrules: []\n")
    (tmp_path / "services").write_text(SERVICES)
    texts = sources.read(str(tmp_path), str(tmp_path / "services"))
    assert [Path(name).name for name, _ in texts.policies] == ["10-a.yaml", "20-b.yaml"]


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_bytes(b"version: 1\xff")
    with pytest.raises(ValueError, match=r"policy\.yaml: not UTF-8 at byte 10"):
        sources.read(str(tmp_path / "policy.yaml"), str(tmp_path / "services"))


def test_a_broken_policy_is_told_in_one_line() -> None:
    texts = sources.Texts((("p.yaml", "version: 1\nrulez: []\n"),), ("s.yaml", SERVICES))
    with pytest.raises(Invalid) as caught:
        sources.compiled(texts, "demo.bank", [LEDGER])
    assert "\n" not in sources.problem_line(caught.value)
    assert "p.yaml:2" in sources.problem_line(caught.value)


def test_the_last_good_comes_back_and_a_torn_one_does_not(tmp_path: Path) -> None:
    texts = sources.Texts((("p.yaml", "version: 1\nrules: []\n"),), ("s.yaml", SERVICES))
    path = tmp_path / "last-good.json"
    assert lastgood.load(path) is None
    lastgood.save(path, texts)
    assert lastgood.load(path) == texts
    path.write_text(path.read_text()[:-9])
    assert lastgood.load(path) is None


class Issuing:
    def __init__(self) -> None:
        self.intermediate = make_intermediate(make_root("demo.bank", NOW), "demo.bank", "a", NOW)
        self.broken = False
        self.calls = 0

    def issue(self, identity: SpiffeId, now: float) -> Leaf:
        self.calls += 1
        if self.broken:
            raise CertError("the issuer is away")
        return make_leaf(self.intermediate, identity, now, 3600)


def test_leaves_are_renewed_past_half_their_life_and_not_before() -> None:
    issuer = Issuing()
    leaves = Leaves(issuer, [LEDGER], pytest.fail, lambda: 0.0)
    assert leaves.renew(NOW)
    first = leaves.texts()[0].serial
    assert not leaves.renew(NOW + 1790)
    assert leaves.renew(NOW + 1801)
    assert leaves.texts()[0].serial != first


def test_a_failed_renewal_keeps_the_old_leaf_and_is_tried_again() -> None:
    issuer, problems = Issuing(), list[str]()
    leaves = Leaves(issuer, [LEDGER], problems.append, lambda: 0.0)
    leaves.renew(NOW)
    old = leaves.texts()
    issuer.broken = True
    assert not leaves.renew(NOW + 1801)
    assert leaves.texts() == old
    assert "the issuer is away" in problems[0]
    calls = issuer.calls
    leaves.renew(NOW + 1802)  # not at once
    assert issuer.calls == calls
    issuer.broken = False
    assert leaves.renew(NOW + 1802 + RETRY_S)


def test_lines_that_a_full_disk_loses_are_counted_and_said(tmp_path: Path) -> None:
    writer = Writer("/dev/full")
    writer.write({"event": "close"})
    writer.write({"event": "close"})
    assert (writer.written, writer.lost) == (0, 2)
    good = Writer(str(tmp_path / "outcomes.jsonl"))
    good._lost_unsaid = writer._lost_unsaid
    good.write({"event": "close"})
    good.write({"event": "close"})
    lines = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert [line.get("lines_lost_before") for line in lines] == [2, None]


def outcome(event: Event, sent: int, reason: str = "ended") -> dict[str, object]:
    return to_json(
        Outcome(
            event=event,
            time=NOW,
            host="a",
            side=Side.SOURCE,
            connection="c1",
            source=LEDGER.uri,
            destination="spiffe://demo.bank/b/postgres",
            service="core-db",
            verdict="allow",
            bytes_sent=sent,
            close_reason=reason,
        )
    )


def test_bytes_count_while_a_flow_lives_and_are_not_counted_twice() -> None:
    metrics = Metrics()
    for event, sent in ((Event.OPEN, 100), (Event.OPEN, 250), (Event.CLOSE, 300)):
        metrics.observe(outcome(event, sent))
    text = metrics.render().decode()
    [line] = [line for line in text.splitlines() if line.startswith("underpass_flow_bytes_total") and '"sent"' in line]
    assert line.endswith(" 300.0")
    assert 'underpass_flows_open{side="source"} 0.0' in text


def test_flows_of_a_killed_proxy_do_not_stay_open_for_ever() -> None:
    now = [0.0]
    metrics = Metrics(15.0, lambda: now[0])
    metrics.observe(outcome(Event.OPEN, 100))
    assert 'underpass_flows_open{side="source"} 1.0' in metrics.render().decode()
    now[0] = 61.0
    assert 'underpass_flows_open{side="source"} 0.0' in metrics.render().decode()


def test_totals_kept_elsewhere_are_counters() -> None:
    metrics = Metrics()
    metrics.total("audit_lines", "Lines.", "fate", {"written": 7, "lost": 1})
    text = metrics.render().decode()
    assert "# TYPE underpass_audit_lines_total counter" in text
    assert 'underpass_audit_lines_total{fate="lost"} 1.0' in text
    assert "_created" not in text


def test_a_peers_text_never_becomes_a_series() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.observe(outcome(Event.CLOSE, 0, f"tunnel lost: {number} reasons"))
    series = [line for line in metrics.render().decode().splitlines() if line.startswith("underpass_flows_total")]
    assert len(series) == 1
    assert series[0].endswith(" 50.0")


def test_an_outcomes_time_is_rfc_3339_in_utc() -> None:
    assert outcome(Event.CLOSE, 0)["time"] == "2027-01-15T08:00:00.000000Z"
