"""The demo's result for people (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.apps.net import percentile
from tests.demo.result import Result

Flow = Mapping[str, Any]
HEADINGS = (
    "source",
    "destination",
    "service",
    "verdict",
    "rule",
    "tls",
    "flows",
    "sent",
    "received",
    "connect ms",
    "added ms p50/p99",
    "rtt us",
)
NUMBERS = HEADINGS[6:]
NOTHING = "-"


def show(result: Result) -> str:
    parts = [
        _columns([HEADINGS, *[_row(group) for group in _groups(result.flows)]]),
        "",
        *[f"{'ok ' if claim.ok else 'NOT'}  {claim.name}: {claim.detail}" for claim in result.claims.made],
        "",
        _summary(result),
    ]
    return "\n".join(parts)


def _groups(flows: Iterable[Flow]) -> list[list[Flow]]:
    """Flows that only differ in their numbers."""
    groups: dict[tuple[str, ...], list[Flow]] = {}
    for flow in flows:
        groups.setdefault(_names(flow), []).append(flow)
    return list(groups.values())


def _names(flow: Flow) -> tuple[str, ...]:
    identities = (_short(flow["source"]), _short(flow["destination"]))
    rest = [flow[key] or NOTHING for key in ("service", "verdict", "rule")]
    return (*identities, *rest, _tls(flow["tls"]))


def _row(group: Sequence[Flow]) -> tuple[str, ...]:
    sent, received = (sum(flow[key] or 0 for flow in group) for key in ("bytes_sent", "bytes_received"))
    connects = [flow["connect_ms"] for flow in group if flow["connect_ms"] is not None]
    rtts = [flow["rtt_us"] for flow in group if flow["rtt_us"] is not None]
    return (
        *_names(group[0]),
        str(len(group)),
        _bytes(sent),
        _bytes(received),
        f"{percentile(connects, 50):.2f}" if connects else NOTHING,
        _added([flow["added_ms"] for flow in group if flow["added_ms"]]),
        f"{percentile(rtts, 50):.0f}" if rtts else NOTHING,
    )


def _added(found: Sequence[Mapping[str, float]]) -> str:
    """Of several flows: the usual p50, and the worst p99."""
    if not found:
        return NOTHING
    return f"{percentile([one['p50'] for one in found], 50):.2f}/{max(one['p99'] for one in found):.2f}"


def _short(identity: str | None) -> str:
    """`a/ledger` for spiffe://demo.bank/a/ledger."""
    return identity.removeprefix("spiffe://").partition("/")[2] if identity else NOTHING


def _tls(tls: Mapping[str, str] | None) -> str:
    return f"{tls['version']} {tls['cipher']}" if tls else NOTHING


def _bytes(count: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [heading in NUMBERS for heading in HEADINGS]
    lines = [
        "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in cells).rstrip()
        for cells in (list(zip(row, widths, right, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _summary(result: Result) -> str:
    held = sum(claim.ok for claim in result.claims.made)
    plaintext = NOTHING if result.plaintext_bytes is None else str(result.plaintext_bytes)
    latency = NOTHING
    if result.added_ms:
        latency = "{p50:.3f} ms p50, {p99:.3f} ms p99".format_map(result.added_ms)
    return (
        f"{held} of {len(result.claims.made)} claims hold; plaintext bytes on the wire: {plaintext}; "
        f"added to each exchange: {latency}; {result.seconds:.1f} s"
    )
