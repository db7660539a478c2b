"""The added latency of exchanges."""

from __future__ import annotations

from agent.outcome import Percentiles
from agent.proxy.latency import AddedLatency


def test_an_exchange_adds_the_cost_of_both_ways() -> None:
    latency = AddedLatency()
    latency.request(60_000)
    latency.response(30_000)  # 90 us: in the bucket up to 100
    assert latency.percentiles() == Percentiles(0.1, 0.1)


def test_only_the_first_write_of_each_way_counts() -> None:
    latency = AddedLatency()
    for cost in (20_000, 5_000_000):
        latency.request(cost)
    latency.response(20_000)
    latency.response(9_000_000)  # more of the same answer
    assert sum(latency.counts) == 1
    assert latency.percentiles() == Percentiles(0.04, 0.04)


def test_bytes_that_answer_nothing_are_no_exchange() -> None:
    latency = AddedLatency()
    latency.response(1)
    assert latency.percentiles() is None


def test_the_tail_is_seen() -> None:
    latency = AddedLatency()
    for number in range(100):
        latency.request(1000)
        latency.response(1_900_000 if number >= 98 else 1000)
    assert latency.percentiles() == Percentiles(0.01, 2.0)
