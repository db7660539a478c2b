"""Ratios of one run (pure): worked out in each round, then their median.

The best peer of a work is the one with the best median over all rounds, and stays the best peer in each of them.
Choosing anew in each round would compare with the luckiest of four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from tests.bench.record import Record, tidy
from tests.bench.works import (
    BULKS,
    CAPTURED,
    CONNECT,
    CPS,
    ENVOY,
    FIXED,
    NONE,
    PEERS,
    RR32,
    SAME_HOST,
    UNCAPTURED,
    Work,
)
from tests.bench.works import IDLE as IDLE_WORK
from tests.bench.works import UNDERPASS as OURS

ByRound = dict[int, float]
LEAST_MS = 0.001  # added latency below what the clock shows is noise, and no peer divides by it


@dataclass(frozen=True, slots=True)
class Ratio:
    value: float
    low: float
    high: float


def ratios(record: Record) -> dict[str, Ratio | None]:
    """None where one of both sides was not measured."""
    added, best_added = _added(record, OURS), _least(_added(record, peer) for peer in PEERS)
    series = {
        "rr32_vs_best_peer": _against_best(record, RR32, "requests_per_s"),
        "rr32_vs_envoy": _over(_of(record, OURS, RR32, "requests_per_s"), _of(record, ENVOY, RR32, "requests_per_s")),
        "added_p99_ms": added,
        "added_p99_vs_best_peer": _each(_over_added, added, best_added),
        "cps_vs_envoy": _over(_of(record, OURS, CPS, "connects_per_s"), _of(record, ENVOY, CPS, "connects_per_s")),
        "bulk_vs_best_peer": _each(min, *[_against_best(record, work, "mb_per_s") for work in BULKS]),
        "cpu_vs_envoy": _over(_of(record, OURS, RR32, "cpu_s_per_100k"), _of(record, ENVOY, RR32, "cpu_s_per_100k")),
        "same_host_vs_direct": _over(
            _of(record, OURS, SAME_HOST, "requests_per_s"), _of(record, NONE, SAME_HOST, "requests_per_s")
        ),
        "idle_memory_vs_envoy": _over(_idle(record, OURS), _idle(record, ENVOY)),
        "connect_hook_us": _hook(record, CAPTURED),
        "connect_hook_uncaptured_us": _hook(record, UNCAPTURED),
    }
    return {name: _ratio(values) for name, values in series.items()}


def _of(record: Record, arm: str, work: Work, figure: str) -> ByRound:
    return record.values(arm, work.name, work.connections, figure)


def _added(record: Record, arm: str) -> ByRound:
    """In milliseconds."""
    return {number: value / 1000 for number, value in _of(record, arm, FIXED, "added_p99_us").items()}


def _idle(record: Record, arm: str) -> ByRound:
    """However many connections a run opens: it is the memory of each."""
    return {
        one.round: one.figures["bytes_per_connection"]
        for one in record.measured
        if (one.arm, one.work) == (arm, IDLE_WORK.name)
    }


def _hook(record: Record, work: str) -> ByRound:
    ours, none = (record.values(arm, work, CONNECT.connections, "connect_us") for arm in (OURS, NONE))
    return _each(lambda with_it, without: with_it - without, ours, none)


def _against_best(record: Record, work: Work, figure: str) -> ByRound:
    peers = [values for peer in PEERS if (values := _of(record, peer, work, figure))]
    best = max(peers, key=lambda values: median(values.values()), default={})
    return _over(_of(record, OURS, work, figure), best)


def _least(peers: Iterable[ByRound]) -> ByRound:
    return min((values for values in peers if values), key=lambda values: median(values.values()), default={})


def _over(ours: ByRound, theirs: ByRound) -> ByRound:
    """A round in which theirs did nothing at all says nothing."""
    return _each(lambda left, right: left / right, ours, {number: value for number, value in theirs.items() if value})


def _over_added(ours: float, theirs: float) -> float:
    return max(ours, LEAST_MS) / max(theirs, LEAST_MS)


def _each(combine: Callable[[float, float], float], left: ByRound, right: ByRound) -> ByRound:
    return {number: combine(left[number], right[number]) for number in left.keys() & right.keys()}


def _ratio(values: ByRound) -> Ratio | None:
    if not values:
        return None
    found = values.values()
    return Ratio(tidy(median(found)), tidy(min(found)), tidy(max(found)))
