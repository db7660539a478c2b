"""Prometheus metrics of one agent, fed from outcomes and counters. The only importer of prometheus_client.

Rendered in control, never in a process that relays bytes: the text of a few hundred series takes over 100 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
CONNECT_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MAX_REASON = 48
MAX_FLOWS = 2000  # combinations of source, destination, service and side; what comes later shares one without names


class Metrics(Collector):
    """Labels are bounded, whatever a peer says: sides and verdicts are enums, reasons are cut at the first colon, what
    a denied peer claims is left out, and the number of combinations has a limit (a stolen host makes up names)."""

    def __init__(self, report_open_every: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nobody asks for
        self._clock = clock
        self._silence_limit = 4 * report_open_every
        self.registry = CollectorRegistry()
        of_flow = ("source", "destination", "service", "side")
        self.flows = Counter(
            "underpass_flows",
            "Flows that ended, by how they ended.",
            (*of_flow, "verdict", "reason", "path"),
            registry=self.registry,
        )
        self.bytes = Counter(
            "underpass_flow_bytes", "Application bytes of flows.", (*of_flow, "direction"), registry=self.registry
        )
        self.connect = Histogram(
            "underpass_flow_connect_seconds", "From connect() to the opened stream.", of_flow,
            buckets=CONNECT_BOUNDS, registry=self.registry,
        )  # fmt: skip
        self.open = Gauge("underpass_flows_open", "Flows known to be open.", ("side",), registry=self.registry)
        self.rejects = Counter(
            "underpass_tunnel_rejects",
            "Peers on the tunnel port that were refused.",
            ("reason",),
            registry=self.registry,
        )
        self.leaf_expiry = Gauge(
            "underpass_leaf_expiry_timestamp_seconds",
            "When the leaf certificate ends.",
            ("identity",),
            registry=self.registry,
        )
        self.generation = Gauge("underpass_snapshot_generation", "Generation in force.", registry=self.registry)
        self.resident = Gauge(
            "underpass_role_resident_bytes", "Resident memory of each process.", ("role",), registry=self.registry
        )
        self._seen: set[tuple[str, ...]] = set()
        self._totals: dict[str, CounterMetricFamily] = {}
        self.registry.register(self)
        self._carried: dict[tuple[str, str], tuple[int, int, float]] = {}  # (connection, side): bytes, last heard of

    def total(self, name: str, text: str, label_name: str, values: Mapping[str, float]) -> None:
        """Counters that are kept elsewhere (in the kernel, in other objects): their present values, by label."""
        family = CounterMetricFamily(f"underpass_{name}", text, labels=(label_name,))
        for value, number in values.items():
            family.add_metric((value,), number)
        self._totals[name] = family

    def collect(self) -> Iterable[Metric]:
        """For the registry (prometheus_client's Collector)."""
        return list(self._totals.values())

    def observe(self, outcome: Mapping[str, Any]) -> None:
        """Account one outcome. Bytes count while a flow lives, by the difference to its last report."""
        if outcome["event"] == "reject":
            self.rejects.labels(label(outcome["reason"])).inc()
            return
        of_flow = self._of_flow(outcome)
        self._count_bytes(outcome, of_flow)
        if outcome["event"] != "open":
            reason = outcome["reason"] if outcome["verdict"] == "deny" else outcome["close_reason"]
            self.flows.labels(*of_flow, outcome["verdict"], label(reason), outcome["path"]).inc()
            if outcome["connect_ms"] is not None:
                self.connect.labels(*of_flow).observe(outcome["connect_ms"] / 1000)

    def _of_flow(self, outcome: Mapping[str, Any]) -> tuple[str, ...]:
        source, destination, service, side = (
            str(outcome[name]) for name in ("source", "destination", "service", "side")
        )
        if side == "destination" and outcome["verdict"] == "deny":
            source, service = f"{source.rpartition('/')[0]}/*", ""  # its host is proven, the rest only claimed
        found = source, destination, service, side
        if found not in self._seen and len(self._seen) >= MAX_FLOWS:
            return "", "", "", side
        self._seen.add(found)
        return found

    def _count_bytes(self, outcome: Mapping[str, Any], of_flow: tuple[str, ...]) -> None:
        key = (str(outcome["connection"]), str(outcome["side"]))
        sent, received, _ = self._carried.get(key, (0, 0, 0.0))
        self.bytes.labels(*of_flow, "sent").inc(max(0, outcome["bytes_sent"] - sent))
        self.bytes.labels(*of_flow, "received").inc(max(0, outcome["bytes_received"] - received))
        if outcome["event"] == "open":
            self._carried[key] = (outcome["bytes_sent"], outcome["bytes_received"], self._clock())
        else:
            self._carried.pop(key, None)

    def render(self) -> bytes:
        """The text; flows that nobody spoke of any more are forgotten first: their proxy was killed."""
        oldest = self._clock() - self._silence_limit
        self._carried = {key: value for key, value in self._carried.items() if value[2] >= oldest}
        for side in ("source", "destination"):
            self.open.labels(side).set(sum(1 for key in self._carried if key[1] == side))
        return generate_latest(self.registry)


def label(reason: str) -> str:
    return reason.partition(":")[0][:MAX_REASON]
