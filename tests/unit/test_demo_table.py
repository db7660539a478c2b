"""What the demo makes of records and measurements: flows, claims, the table, the JSON object."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.apps.net import parse_address, percentile
from tests.demo import lock, on
from tests.demo.claims import Claims, NotSoError
from tests.demo.flows import FIELDS, flows, unmatched
from tests.demo.result import Result, added
from tests.demo.table import HEADINGS, show

TLS = {"version": "TLSv1.3", "cipher": "TLS_AES_256_GCM_SHA384", "peer_serial": "01"}


def outcome(**changes: Any) -> dict[str, Any]:
    return {
        "event": "close",
        "host": "a",
        "side": "source",
        "connection": "1" * 32,
        "source": "spiffe://demo.bank/a/ledger",
        "destination": "spiffe://demo.bank/b/postgres",
        "service": "core-db",
        "verdict": "allow",
        "rule": "ledger-reads-core",
        "tls": TLS,
        "bytes_sent": 1500,
        "bytes_received": 2_500_000,
        "connect_ms": 1.25,
        "added_ms": {"p50": 0.1, "p99": 0.4},
        "rtt_us": 40,
        **changes,
    }


def denied(**changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("tls", "connect_ms", "added_ms", "rtt_us"))
    kernel = {"event": "deny", "connection": "", "destination": "", "verdict": "deny", "rule": "batch-stays-away"}
    return outcome(**{**nothing, **kernel, "bytes_sent": 0, "bytes_received": 0, **changes})


def quiet() -> Claims:
    return Claims(progress=io.StringIO())


def told(*found: dict[str, Any]) -> Result:
    result = Result(quiet(), flows=flows(found), added_ms={"p50": 0.2, "p99": 0.9}, plaintext_bytes=0, seconds=12.34)
    result.claims.add("psql works", True, "it does")
    return result


def test_a_connection_is_one_flow_with_its_last_record() -> None:
    (flow,) = flows([outcome(event="open", bytes_sent=1), outcome(bytes_sent=7)])
    assert flow["bytes_sent"] == 7
    assert tuple(flow) == FIELDS


def test_the_destination_side_of_a_connection_is_not_another_flow() -> None:
    assert len(flows([outcome(), outcome(side="destination", host="b")])) == 1


def test_each_refusal_in_the_kernel_is_a_flow_of_its_own() -> None:
    assert len(flows([denied(), denied()])) == 2


@pytest.mark.parametrize(
    ("there", "wrong"),
    [
        ([outcome(side="destination", host="b")], False),
        ([], True),
        ([outcome(side="destination", host="b", bytes_sent=1)], True),
        ([outcome(side="destination", host="b")] * 2, True),
        ([outcome(side="destination", host="b", event="open")], True),
    ],
)
def test_records_of_both_hosts_have_to_agree(there: list[dict[str, Any]], wrong: bool) -> None:
    assert bool(unmatched([outcome()], there)) is wrong


def test_the_table_sums_flows_that_only_differ_in_numbers() -> None:
    lines = show(told(outcome(), outcome(connection="2" * 32), denied(), denied())).splitlines()
    assert lines[0].split("  ")[0] == HEADINGS[0]
    allow, deny = lines[2], lines[3]
    for cell in ("a/ledger", "b/postgres", "TLSv1.3 TLS_AES_256_GCM_SHA384", " 2 ", "3.0 kB", "5.0 MB", "0.10/0.40"):
        assert cell in allow
    assert " ".join(deny.split()) == "a/ledger - core-db deny batch-stays-away - 2 0 B 0 B - - -"


def test_a_table_without_flows_still_tells_the_claims() -> None:
    text = show(told())
    assert "ok   psql works: it does" in text
    assert "plaintext bytes on the wire: 0; added to each exchange: 0.200 ms p50, 0.900 ms p99; 12.3 s" in text


def test_the_json_has_exactly_the_promised_keys() -> None:
    found = json.loads(json.dumps(told(outcome()).as_json()))
    assert list(found) == ["ok", "claims", "flows", "added_ms", "plaintext_bytes_on_wire", "seconds"]
    assert found["claims"] == [{"name": "psql works", "ok": True, "detail": "it does"}]
    assert found["ok"] is True


def test_the_json_of_a_demo_that_never_measured_says_so() -> None:
    found = Result(quiet()).as_json()
    assert found["ok"] is False
    assert found["plaintext_bytes_on_wire"] is None
    assert found["added_ms"] == {"p50": None, "p99": None}


def test_one_claim_that_does_not_hold_is_enough() -> None:
    def wrong() -> str:
        raise NotSoError("it answered\n  something else")

    claims = quiet()
    claims.check("right", lambda: "seen")
    claims.check("wrong", wrong)
    claims.check("broken", lambda: [""][1])
    assert [claim.ok for claim in claims.made] == [True, False, False]
    assert claims.made[1].detail == "it answered something else"
    assert claims.made[2].detail.startswith("IndexError: ")
    assert not claims.ok


def test_claims_that_were_never_made_hold_nothing() -> None:
    assert not quiet().ok


def test_added_latency_is_the_difference_of_the_median_round() -> None:
    rounds = [
        ({"p50_ms": 0.2, "p99_ms": 0.5}, {"p50_ms": 0.5, "p99_ms": 2.0}),
        ({"p50_ms": 9.0, "p99_ms": 9.0}, {"p50_ms": 0.5, "p99_ms": 0.5}),  # somebody else used the machine
        ({"p50_ms": 0.2, "p99_ms": 0.5}, {"p50_ms": 0.6, "p99_ms": 3.0}),
    ]
    assert added(rounds) == {"p50": 0.3, "p99": 1.5}


def test_percentiles_are_values_that_were_measured() -> None:
    values = list(range(1, 101))
    assert (percentile(values, 50), percentile(values, 99), percentile([7], 99)) == (50, 99, 7)


@pytest.mark.parametrize(
    ("text", "address"), [("10.77.0.2:80", ("10.77.0.2", 80)), ("[fd77::2]:80", ("fd77::2", 80))]
)
def test_addresses_of_both_families_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "10.77.0.2", ":80", "fd77::2:80", "10.77.0.2:http"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected ADDRESS:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage"),
        (["a"], "usage"),
        (["a", "ledger", "--"], "usage"),
        (["c", "ledger", "--", "true"], "no host 'c'"),
        (["a", "postgres", "--", "true"], "no application 'postgres' on host a; there are ledger"),
        (["a", "agent", "--", "true"], "no application 'agent'"),
    ],
)
def test_on_says_in_one_line_what_is_wrong(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        on.read(arguments)


def test_only_one_demo_has_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "FILE", tmp_path / "lock")
    monkeypatch.setattr(lock, "PATIENCE_S", 0)
    assert not lock.held()
    mine = lock.take()
    assert mine is not None
    assert lock.held()
    assert lock.take() is None
    lock.release(mine)
    assert not lock.held()
    assert list(tmp_path.iterdir()) == []
