"""A run for people (pure): works by arms, then ratios and their bars; Markdown, which also reads well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.ratios import Ratio
from tests.bench.record import Record
from tests.bench.works import ARMS, CAPTURED, FIXED, IDLE, SAME_HOST, UNCAPTURED

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Bar:
    what: str
    limit: float
    at_least: bool

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


BARS = {
    "rr32_vs_best_peer": Bar("request/reply, 32 connections, over the best peer", 1.0, True),
    "rr32_vs_envoy": Bar("the same over Envoy", 1.2, True),
    "added_p99_ms": Bar("p99 added at 1,000 requests/s, ms", 0.5, False),
    "added_p99_vs_best_peer": Bar("the same over the best peer's", 1.0, False),
    "cps_vs_envoy": Bar("new connections per second over Envoy", 4.0, True),
    "bulk_vs_best_peer": Bar("bulk over the best peer, the worse of one and four streams", 0.9, True),
    "cpu_vs_envoy": Bar("CPU per request over Envoy", 1.0, False),
    "same_host_vs_direct": Bar("same host over no agent", 0.97, True),
    "idle_memory_vs_envoy": Bar("memory per idle connection over Envoy", 1.0, False),
    "connect_hook_us": Bar("added to a captured connect(), us", 5.0, False),
    "connect_hook_uncaptured_us": Bar("added to an uncaptured connect(), us", 1.0, False),
}

# Which figure of which work becomes a line, and how: work name (or its beginning), figure, heading, format.
_LINES = (
    ("rr-", "requests_per_s", "requests/s", "{:,.0f}"),
    ("rr-", "p50_us", "p50 us", "{:,.0f}"),
    ("rr-", "p99_us", "p99 us", "{:,.0f}"),
    ("rr-", "p999_us", "p99.9 us", "{:,.0f}"),
    ("rr-", "cpu_s_per_100k", "CPU s per 100,000 requests", "{:.2f}"),
    (FIXED.name, "p50_us", "p50 us at 1,000 requests/s", "{:,.0f}"),
    (FIXED.name, "p99_us", "p99 us at 1,000 requests/s", "{:,.0f}"),
    (FIXED.name, "added_p50_us", "added to p50, us", "{:,.0f}"),
    (FIXED.name, "added_p99_us", "added to p99, us", "{:,.0f}"),
    ("cps", "connects_per_s", "connects/s", "{:,.0f}"),
    ("cps", "cpu_s_per_100k", "CPU s per 100,000 connects", "{:.1f}"),
    ("bulk", "mb_per_s", "MB/s", "{:,.0f}"),
    ("bulk", "cpu_s_per_gb", "CPU s per GB", "{:.2f}"),
    (SAME_HOST.name, "requests_per_s", "requests/s", "{:,.0f}"),
    (CAPTURED, "connect_us", "connect() us", "{:.1f}"),
    (UNCAPTURED, "connect_us", "connect() us", "{:.1f}"),
    (IDLE.name, "start_mb", "MB at start", "{:.1f}"),
    (IDLE.name, "mb_per_10k", "MB per 10,000 idle connections", "{:.1f}"),
)


def show(record: Record, ratios: Mapping[str, Ratio | None]) -> str:
    parts = [columns(_works(record)), columns(_ratios(ratios))]
    if record.failures:
        parts.append("\n".join(_failures(record)))
    return "\n\n".join(parts)


def _works(record: Record) -> list[list[str]]:
    arms = [arm for arm in ARMS if any(one.arm == arm for one in record.measured)]
    rows = [["work", "connections", "figure", *arms]]
    for prefix, figure, heading, shape in _LINES:
        having = [one for one in record.measured if one.work.startswith(prefix) and figure in one.figures]
        works = dict.fromkeys((one.work, one.connections) for one in having)
        for work, connections in works:
            cells = [_cell(record, arm, work, connections, figure, shape) for arm in arms]
            rows.append([work, str(connections), heading, *cells])
    return rows


def _cell(record: Record, arm: str, work: str, connections: int, figure: str, shape: str) -> str:
    value = record.median(arm, work, connections, figure)
    if value is not None:
        return shape.format(value)
    return "failed" if record.failed(arm, work, connections) else NOTHING


def _ratios(ratios: Mapping[str, Ratio | None]) -> list[list[str]]:
    rows = [["ratio", "median", "min..max", "bar", "", "what"]]
    for name, bar in BARS.items():
        ratio = ratios.get(name)
        if ratio is None:
            rows.append([name, NOTHING, NOTHING, str(bar), "not measured", bar.what])
            continue
        held = "ok" if bar.holds(ratio.value) else "MISSED"
        rows.append([name, f"{ratio.value:.3g}", f"{ratio.low:.3g}..{ratio.high:.3g}", str(bar), held, bar.what])
    return rows


def _failures(record: Record) -> list[str]:
    return [
        f"FAILED {one.arm} at {one.work}{f', {one.connections} connections' if one.connections else ''}: {one.reason}"
        for one in record.failures
    ]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
