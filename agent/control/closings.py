"""The end of a direct flow becomes its outcome. Pure.

No proxy saw it: who, where and which rule are what the kernel's tables said at connect(); the bytes are TCP's count.
"""

from __future__ import annotations

from agent.control.refusals import destination_of
from agent.outcome import Event, Outcome, Path, Side, socket_text
from agent.records import Closing
from agent.route import Routes
from policy.compile import Table
from policy.model import Reason

ENDED, RESET, FAILED = "ended", "reset", "connect_failed"  # the first as the proxy says it
_SYN_SENT = 2
_ORDERLY = (5, 9, 11)  # FIN wait 2, last ACK, closing: at least our side has said that it is done


def outcome_of_closing(
    closing: Closing, table: Table | None, host: str, wall: float, routes: Routes | None = None
) -> Outcome:
    """`wall` is when it ended, in seconds since the epoch. Ids that the table no longer knows are shown as numbers."""
    callers = table.callers if table else {}
    services = table.service_names if table else {}
    rules = table.rules if table else {}
    caller = callers.get(closing.caller)
    return Outcome(
        event=Event.CLOSE,
        time=wall,
        host=host,
        side=Side.SOURCE,
        connection=f"{closing.cookie:016x}{closing.started_ns:016x}",
        source=caller.uri if caller else f"caller-{closing.caller:08x}",
        destination=destination_of(closing.original, closing.original_port, routes),
        service=services.get(closing.service, f"service-{closing.service:08x}"),
        verdict="allow",
        rule=rules.get(closing.rule, f"rule-{closing.rule:08x}"),
        reason=Reason.ALLOWED.value,
        client=socket_text(closing.source, closing.source_port) if closing.source else "",
        server=socket_text(closing.original, closing.original_port),
        bytes_sent=closing.bytes_sent,
        bytes_received=closing.bytes_received,
        connect_ms=_ms(closing.connected_ns - closing.started_ns) if closing.connected_ns else None,
        duration_ms=_ms(closing.at_ns - closing.started_ns),
        rtt_us=closing.rtt_us or None,
        close_reason=_reason(closing.state),
        path=Path.DIRECT,
        pid=closing.pid,
        uid=closing.uid,
    )


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _reason(state: int) -> str:
    if state == _SYN_SENT:
        return FAILED
    return ENDED if state in _ORDERLY else RESET
