"""What tcpdump saw on the veth, and what both hosts put on record."""

from __future__ import annotations

from tests.demo.claims import Claims, expect
from tests.demo.flows import closed, unmatched
from tests.demo.traffic import NEEDLES
from tests.world.wait import until
from tests.world.wire import WireReport
from tests.world.world import World

RECORDS_S = 5


def show_judge(report: WireReport, claims: Claims) -> None:
    """A judge that never finds anything proves nothing: first it has to find what is there."""

    def seen() -> str:
        expect(report.dropped == 0, f"the capture lost {report.dropped} packets")
        expect(bool(report.needles), "card number and merchant were not found")
        expect(report.plaintext_bytes > 0, "no plaintext was counted")
        return f"{report.plaintext_bytes} plaintext bytes, {len(report.needles)} secrets readable"

    claims.check("without Underpass the same tcpdump shows plaintext", seen)


def show_wire(report: WireReport, claims: Claims) -> None:
    def only_tls() -> str:
        expect(report.tls13_connections > 0, "no TLS 1.3 connection was seen")
        expect(report.clean, _first(report.problems))
        return (
            f"{report.packets} packets, {report.tls13_connections} TLS 1.3 connections, "
            f"{report.encrypted_bytes} bytes, 0 plaintext bytes, 0 packets to other TCP ports"
        )

    def no_secrets() -> str:
        expect(report.packets > 0, "nothing was captured")
        expect(not report.needles, f"found: {report.needles}")
        return f"{len(NEEDLES)} searched, none found"

    claims.check("nothing but TLS 1.3 to the tunnel port crossed the wire", only_tls)
    claims.check("no SQL text, card number or ISO 8583 bytes on the wire", no_secrets)


def show_records(world: World, claims: Claims) -> None:
    """Asked while nothing was killed yet: a killed proxy can put nothing on record."""

    def both() -> str:
        until(lambda: _agree(world), RECORDS_S, "one record of each end on both hosts, with the same bytes")
        return f"{closed(world.a.outcomes())} connections, each with one record of its end on each host"

    claims.check("each connection ends in one record on each host, with the same bytes", both)


def _agree(world: World) -> bool:
    a, b = world.a.outcomes(), world.b.outcomes()
    return closed(a) > 0 and not unmatched(a, b) and not unmatched(b, a)


def _first(problems: list[str]) -> str:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
