"""What the bench makes of its figures: medians, ratios, bars, the table, the JSON object, RESULTS.md."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bench import report, table
from tests.bench.added import with_added
from tests.bench.idle import figures as idle_figures
from tests.bench.measure import figures
from tests.bench.process import parse_cpu, parse_pss
from tests.bench.ratios import Ratio, ratios
from tests.bench.record import Failure, Measured, Record, medians
from tests.bench.report import Facts
from tests.bench.works import ARMS, BULKS, CPS, FIXED, FULL, QUICK, RR32, Kind, Work, fitted, narrowed, rotated

KEYS = (
    "rr32_vs_best_peer", "rr32_vs_envoy", "added_p99_ms", "added_p99_vs_best_peer", "cps_vs_envoy", "bulk_vs_best_peer",
    "cpu_vs_envoy", "same_host_vs_direct", "idle_memory_vs_envoy", "connect_hook_us",
)  # fmt: skip
FACTS = Facts("./run bench --quick", "2026-01-02", "2 cores", {"kernel": "6.1", "envoy": "1.40.0"}, "3 rounds")


def record(*rows: tuple[str, str, int, str, list[float]]) -> Record:
    """Rows of arm, work, connections, figure, and its values round by round."""
    made = Record()
    for arm, work, connections, figure, values in rows:
        made.measured += [
            Measured(arm, work, connections, number, {figure: value}) for number, value in enumerate(values)
        ]
    return made


def rr32(arm: str, *values: float) -> tuple[str, str, int, str, list[float]]:
    return arm, RR32.name, RR32.connections, "requests_per_s", list(values)


def p99(arm: str, *values: float) -> tuple[str, str, int, str, list[float]]:
    return arm, FIXED.name, FIXED.connections, "p99_us", list(values)


def ratio(name: str, of: Record) -> Ratio:
    found = ratios(with_added(of))[name]
    assert found is not None
    return found


def test_every_ratio_has_a_name_a_bar_and_no_value_before_anything_was_measured() -> None:
    found = ratios(Record())
    assert set(KEYS) <= set(found)
    assert set(found) == set(table.BARS)
    assert set(found.values()) == {None}


def test_a_ratio_is_made_in_each_round_and_then_their_median() -> None:
    # Medians first would give 200/100: the rounds pair what was measured in the same minute.
    of = record(rr32("underpass", 100, 200, 300), rr32("envoy", 100, 50, 100))
    assert ratio("rr32_vs_envoy", of) == Ratio(3.0, 1.0, 4.0)


def test_the_best_peer_is_the_best_over_all_rounds_and_not_of_each() -> None:
    of = record(rr32("underpass", 10, 10, 10), rr32("nginx", 10, 10, 10), rr32("haproxy", 40, 5, 5))
    assert ratio("rr32_vs_best_peer", of) == Ratio(1.0, 1.0, 1.0)


def test_added_latency_is_over_no_proxy_of_the_same_round() -> None:
    of = record(p99("none", 200, 200), p99("underpass", 500, 700), p99("haproxy", 400, 400), p99("nginx", 900, 900))
    assert ratio("added_p99_ms", of) == Ratio(0.4, 0.3, 0.5)
    assert ratio("added_p99_vs_best_peer", of) == Ratio(2.0, 1.5, 2.5)


def test_results_say_what_an_arm_adds_and_leave_out_rounds_without_a_base() -> None:
    of = with_added(record(p99("none", 200), p99("haproxy", 350, 400), rr32("haproxy", 5)))
    assert of.values("haproxy", FIXED.name, FIXED.connections, "added_p99_us") == {0: 150}
    assert of.values("none", FIXED.name, FIXED.connections, "added_p99_us") == {}


def test_a_peer_that_seems_to_add_nothing_is_not_divided_by() -> None:
    of = record(p99("none", 200), p99("underpass", 210), p99("haproxy", 190))
    assert ratio("added_p99_vs_best_peer", of).value == 10.0


def test_bulk_is_the_worse_of_one_and_four_streams() -> None:
    rows = []
    for work, ours in zip(BULKS, (80.0, 150.0), strict=True):
        rows.append(("underpass", work.name, work.connections, "mb_per_s", [ours]))
        rows.append(("haproxy", work.name, work.connections, "mb_per_s", [100.0]))
    assert ratio("bulk_vs_best_peer", record(*rows)).value == 0.8


def test_what_only_one_side_has_is_no_ratio() -> None:
    of = record(rr32("underpass", 100), ("envoy", CPS.name, CPS.connections, "connects_per_s", [5]))
    assert ratios(of)["rr32_vs_envoy"] is None
    assert ratios(of)["cps_vs_envoy"] is None


def test_a_round_in_which_the_other_did_nothing_is_left_out() -> None:
    of = record(rr32("underpass", 100, 100), rr32("envoy", 0, 50))
    assert ratio("rr32_vs_envoy", of) == Ratio(2.0, 2.0, 2.0)


def test_idle_memory_is_compared_for_each_connection_however_many_there_were() -> None:
    rows = [("underpass", 500, 30.0), ("envoy", 1000, 60.0)]
    of = record(*[(arm, "idle", count, "bytes_per_connection", [each]) for arm, count, each in rows])
    assert ratio("idle_memory_vs_envoy", of).value == 0.5


def test_the_hook_costs_what_it_adds_to_a_connect_without_one() -> None:
    rows = [("none", "connect-captured", 14.0), ("underpass", "connect-captured", 17.5)]
    of = record(*[(arm, work, 1, "connect_us", [value]) for arm, work, value in rows])
    assert ratio("connect_hook_us", of).value == 3.5


def test_figures_of_requests_come_with_the_cpu_that_they_took() -> None:
    said = {"requests": 50_000, "seconds": 2.0, "p50_us": 20.0, "p99_us": 90.0, "p999_us": 200.0, "max_us": 300.0}
    latencies = {"p50_us": 20.0, "p99_us": 90.0, "p999_us": 200.0}
    assert figures(RR32, said, 3.0) == {"requests_per_s": 25_000, "cpu_s_per_100k": 6.0, **latencies}
    assert "cpu_s_per_100k" not in figures(RR32, said, 0.0)
    assert "connects_per_s" in figures(CPS, said, 3.0)


def test_figures_of_bulk_and_of_idle_connections() -> None:
    assert figures(BULKS[0], {"bytes": 2_000_000_000, "seconds": 4.0}, 3.0) == {"mb_per_s": 500, "cpu_s_per_gb": 1.5}
    assert idle_figures(10_000_000, 40_000_000, 1000) == {
        "start_mb": 10, "opened": 1000, "bytes_per_connection": 30_000, "mb_per_10k": 300,
    }  # fmt: skip


def test_cpu_and_memory_are_read_past_a_strange_name() -> None:
    fields = "S 1 1 1 0 -1 4194560 100 0 0 0 250 150 0 0 20 0 3 0 500 1 1"
    assert parse_cpu(f"42 (a) b ( c) {fields}") == pytest.approx(4.0)
    assert parse_cpu("") == 0
    assert parse_pss("00400000-7ffd 00000000 [rollup]\nRss:  900 kB\nPss:  300 kB\nPss_Dirty:  10 kB\n") == 300 * 1024
    assert parse_pss("") == 0


def test_arms_take_turns_at_being_first() -> None:
    assert rotated(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert rotated(["a", "b", "c"], 4) == ["b", "c", "a"]
    assert rotated([], 3) == []


def test_a_full_run_has_every_work_of_the_issue() -> None:
    sizes = {(work.size, work.connections) for work in FULL.works if work.kind is Kind.RR}
    assert sizes == {(size, connections) for size in (200, 1024) for connections in (1, 16, 32, 64)}
    assert {work.kind for work in FULL.works} == set(Kind) - {Kind.IDLE}
    assert FULL.idle.connections == 10_000
    assert FULL.idle_rounds


def test_a_quick_run_is_enough_for_every_ratio() -> None:
    assert RR32 in QUICK.works
    assert {work.kind for work in QUICK.works} == {work.kind for work in FULL.works}
    assert QUICK.rounds >= 3


def test_only_what_is_asked_for_is_measured() -> None:
    plan = narrowed(QUICK, ["cps"], 1)
    assert (plan.works, plan.rounds, plan.idle_rounds) == ((CPS,), 1, 0)
    assert narrowed(QUICK, ["idle"], None).works == ()
    assert fitted(FULL, 300).idle.connections == 300
    with pytest.raises(ValueError, match="no such work: nothing; there are "):
        narrowed(QUICK, ["nothing"], None)


def test_peers_have_no_part_in_what_only_capture_can() -> None:
    assert Work("x", Kind.SAME_HOST, 1).arms == ("none", "underpass")
    assert CPS.arms == ARMS


def test_results_are_medians_with_their_spread_and_failures_have_a_reason() -> None:
    of = record(rr32("envoy", 100, 300, 200))
    of.failures.append(Failure("nginx", "cps", 16, "connection reset"))
    done, failed = of.results()
    assert done == {
        "arm": "envoy", "work": "rr-200", "connections": 32, "rounds": 3, "requests_per_s": 200,
        "spread": {"requests_per_s": [100, 300]},
    }  # fmt: skip
    assert failed == {"arm": "nginx", "work": "cps", "connections": 16, "error": "connection reset"}


def test_several_turns_in_a_round_count_as_their_median() -> None:
    turns = [{"p99_us": 90.0, "cpu": 1.0}, {"p99_us": 4000.0}, {"p99_us": 100.0, "cpu": 3.0}]
    assert medians(turns) == {"p99_us": 100, "cpu": 2}


def test_what_failed_is_not_tried_again() -> None:
    of = Record(failures=[Failure("nginx", "cps", 16, "reset")])
    assert of.failed("nginx", "cps", 16)
    assert not of.failed("nginx", "bulk", 1)


def test_json_has_results_ratios_and_spread() -> None:
    of = record(rr32("underpass", 100, 200), rr32("envoy", 100, 100))
    answer: dict[str, Any] = json.loads(json.dumps(report.as_json(of, ratios(of))))
    assert {"results", "ratios", "spread"} <= set(answer)
    assert answer["ratios"]["rr32_vs_envoy"] == 1.5
    assert answer["spread"]["rr32_vs_envoy"] == [1.0, 2.0]
    assert answer["ratios"]["connect_hook_us"] is None


def test_the_table_shows_arms_bars_and_failures() -> None:
    of = record(rr32("underpass", 15_000), rr32("envoy", 10_000), rr32("haproxy", 20_000))
    of.failures.append(Failure("nginx", "rr-200", 32, "connection reset"))
    text = table.show(of, ratios(of))
    assert "| rr-200 | 32          | requests/s | 20,000  | 10,000 | 15,000    |" in text
    assert "| rr32_vs_envoy              | 1.5    | 1.5..1.5   | >= 1.2  | ok " in text
    assert "| rr32_vs_best_peer          | 0.75   | 0.75..0.75 | >= 1    | MISSED " in text
    assert text.endswith("FAILED nginx at rr-200, 32 connections: connection reset")


@pytest.mark.parametrize(("name", "value", "holds"), [
    ("rr32_vs_envoy", 1.2, True), ("rr32_vs_envoy", 1.19, False), ("connect_hook_us", 4.9, True),
    ("connect_hook_us", 5.1, False),
])  # fmt: skip
def test_bars_have_a_direction(name: str, value: float, holds: bool) -> None:
    assert table.BARS[name].holds(value) is holds


def test_results_name_machine_versions_date_and_command_and_keep_the_notes() -> None:
    of = record(rr32("envoy", 10_000))
    first = report.as_markdown(of, ratios(of), FACTS, "")
    assert all(part in first for part in ("./run bench --quick", "2026-01-02", "2 cores", "kernel 6.1, envoy 1.40.0"))
    noted = report.as_markdown(of, ratios(of), FACTS, first + "\nWhere the time goes.\n")
    assert noted.endswith("## Notes\n\nWhere the time goes.\n")
    assert noted.count("## Notes") == 1
