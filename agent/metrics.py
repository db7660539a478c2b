"""Prometheus metrics of one agent, fed from outcomes and counters. The only importer of prometheus_client.

Rendered in control, never in a process that relays bytes: the text of a few hundred series takes over 100 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
CONNECT_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MAX_REASON = 48


class Metrics:
    """Labels are bounded: identities and services are configured, sides and verdicts are enums, reasons are cut at the
    first colon so that no peer's text becomes a series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_flow = ("source", "destination", "service", "side")
        self.flows = Counter(
            "underpass_flows",
            "Flows that ended, by how they ended.",
            (*of_flow, "verdict", "reason"),
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
        self.lines = Counter("underpass_audit_lines", "Outcome lines, by fate.", ("fate",), registry=self.registry)
        self.exits = Gauge(
            "underpass_kernel_exits",
            "Ways out of the kernel programs since they were loaded.",
            ("exit",),
            registry=self.registry,
        )
        self.leaf_expiry = Gauge(
            "underpass_leaf_expiry_timestamp_seconds",
            "When the leaf certificate ends.",
            ("identity",),
            registry=self.registry,
        )
        self.rotations = Counter(
            "underpass_leaf_rotations", "Leaf certificates issued.", ("result",), registry=self.registry
        )
        self.generation = Gauge("underpass_snapshot_generation", "Generation in force.", registry=self.registry)
        self.reloads = Counter(
            "underpass_policy_reloads", "Policy and services reloads.", ("result",), registry=self.registry
        )
        self._carried: dict[tuple[str, str], tuple[int, int]] = {}

    def observe(self, outcome: Mapping[str, Any]) -> None:
        """Account one outcome. Bytes count while a flow lives, by the difference to its last report."""
        if outcome["event"] == "reject":
            self.rejects.labels(label(outcome["reason"])).inc()
            return
        of_flow = tuple(str(outcome[name]) for name in ("source", "destination", "service", "side"))
        self._count_bytes(outcome, of_flow)
        if outcome["event"] != "open":
            reason = outcome["reason"] if outcome["verdict"] == "deny" else outcome["close_reason"]
            self.flows.labels(*of_flow, outcome["verdict"], label(reason)).inc()
            if outcome["connect_ms"] is not None:
                self.connect.labels(*of_flow).observe(outcome["connect_ms"] / 1000)

    def _count_bytes(self, outcome: Mapping[str, Any], of_flow: tuple[str, ...]) -> None:
        key = (str(outcome["connection"]), str(outcome["side"]))
        sent, received = self._carried.get(key, (0, 0))
        self.bytes.labels(*of_flow, "sent").inc(max(0, outcome["bytes_sent"] - sent))
        self.bytes.labels(*of_flow, "received").inc(max(0, outcome["bytes_received"] - received))
        if outcome["event"] == "open":
            self._carried[key] = (outcome["bytes_sent"], outcome["bytes_received"])
        else:
            self._carried.pop(key, None)
        for side in ("source", "destination"):
            self.open.labels(side).set(sum(1 for other in self._carried if other[1] == side))

    def render(self) -> bytes:
        return generate_latest(self.registry)


def label(reason: str) -> str:
    return reason.partition(":")[0][:MAX_REASON]
