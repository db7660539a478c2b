"""A connect() refused in the kernel becomes the outcome of that flow. Pure."""

from __future__ import annotations

from agent.outcome import Event, Outcome, Path, Side, socket_text
from agent.records import CALLER_NOBODY, Address, Exit, Refusal
from agent.route import Route, Routes
from policy.compile import Table
from policy.model import DEFAULT_RULE, Reason

REASONS = {
    Exit.UNAVAILABLE: "no_healthy_endpoint",
    Exit.FULL: "flow_map_full",
    Exit.LOOP: "own_port",
    Exit.NO_PROXY: "no_proxy",
}


def outcome_of(refusal: Refusal, table: Table | None, host: str, wall: float, routes: Routes | None = None) -> Outcome:
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
        destination=destination_of(refusal.original, refusal.original_port, routes),
        service=services.get(refusal.service, f"service-{refusal.service:08x}" if refusal.service else ""),
        verdict="deny",
        rule=rules.get(refusal.rule, f"rule-{refusal.rule:08x}" if refusal.rule else ""),
        reason=_reason(refusal, rules.get(refusal.rule)),
        server=socket_text(refusal.original, refusal.original_port),
        command=refusal.command,
        pid=refusal.pid,
        uid=refusal.uid,
        path=Path.NONE,
    )


def destination_of(address: Address | None, port: int, routes: Routes | None) -> str:
    route = routes.to(address, port) if routes and address else None
    return route.destination.uri if isinstance(route, Route) else ""


def _reason(refusal: Refusal, rule: str | None) -> str:
    """The same words that policy uses where it decides itself."""
    if refusal.exit == Exit.DENIED:
        if refusal.caller == CALLER_NOBODY:
            return Reason.NO_IDENTITY.value
        return Reason.NO_MATCHING_RULE.value if rule == DEFAULT_RULE else Reason.DENIED_BY_RULE.value
    known = {int(exit_): text for exit_, text in REASONS.items()}
    return known.get(refusal.exit, f"kernel_exit_{refusal.exit}")
