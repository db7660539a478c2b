"""A connect() refused in the kernel becomes the outcome of that flow. Pure."""

from __future__ import annotations

from agent.outcome import Event, Outcome, Side, socket_text
from agent.records import Exit, Refusal
from policy.compile import Table

REASONS = {
    Exit.DENIED: "denied_in_kernel",
    Exit.UNAVAILABLE: "no_healthy_endpoint",
    Exit.FULL: "flow_map_full",
    Exit.LOOP: "own_port",
}


def outcome_of(refusal: Refusal, table: Table | None, host: str, wall: float) -> Outcome:
    """`wall` is when, in seconds since the epoch. Ids that the table no longer knows are shown as numbers."""
    callers = table.callers if table else {}
    services = table.service_names if table else {}
    rules = table.rules if table else {}
    caller = callers.get(refusal.caller)
    return Outcome(
        event=Event.DENY,
        time=wall,
        host=host,
        side=Side.SOURCE,
        source=caller.uri if caller else "",
        service=services.get(refusal.service, f"service-{refusal.service:08x}" if refusal.service else ""),
        verdict="deny",
        rule=rules.get(refusal.rule, f"rule-{refusal.rule:08x}" if refusal.rule else ""),
        reason=_reason(refusal.exit),
        server=socket_text(refusal.original, refusal.original_port),
        command=refusal.command,
        pid=refusal.pid,
        uid=refusal.uid,
    )


def _reason(exit_: int) -> str:
    try:
        return REASONS[Exit(exit_)]
    except (ValueError, KeyError):
        return f"kernel_exit_{exit_}"
