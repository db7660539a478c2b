"""A decision, told to people: first what was decided, then why each rule did or did not count."""

from __future__ import annotations

from typing import assert_never

from policy.evaluate import decide, matches_port, matches_service, matches_source
from policy.model import Decision, Effect, Policy, Reason, Request, Rule


def explain(policy: Policy | None, trust_domain: str, request: Request) -> list[str]:
    """Lines of text; the first is the decision."""
    decision = decide(policy, trust_domain, request)
    source = request.source.short if request.source else "unidentified caller"
    asked = f"{source} to {request.service} port {request.port} on {request.destination.short}"
    lines = [f"{decision.verdict.value}: {asked}: {_because(decision, trust_domain)}"]
    return lines + [_about(rule, trust_domain, request, decision) for rule in (policy.rules if policy else ())]


def _because(decision: Decision, trust_domain: str) -> str:
    match decision.reason:
        case Reason.ALLOWED:
            return f"rule {decision.rule} allows it"
        case Reason.DENIED_BY_RULE:
            return f"rule {decision.rule} denies it"
        case Reason.NO_MATCHING_RULE:
            return "no rule matches, and what no rule allows is denied"
        case Reason.NO_IDENTITY:
            return "the caller has no identity; add it under identities in the agent's configuration"
        case Reason.FOREIGN_TRUST_DOMAIN:
            return f"source and destination must both be of trust domain {trust_domain}"
        case Reason.NO_POLICY:
            return "no policy is loaded; see why the last reload failed"
    assert_never(decision.reason)


def _about(rule: Rule, trust_domain: str, request: Request, decision: Decision) -> str:
    misses = _misses(rule, trust_domain, request)
    fate = "does not match: " + "; ".join(misses) if misses else _fate(rule, decision)
    return f"rule {rule.name} ({rule.effect.value}) {fate}"


def _misses(rule: Rule, trust_domain: str, request: Request) -> list[str]:
    misses = []
    if not matches_source(rule, trust_domain, request):
        source = request.source.uri if request.source else "a caller without identity"
        misses.append(f"source {source} is not in {_listed(rule.sources)} of {trust_domain}")
    if not matches_service(rule, request):
        misses.append(f"service {request.service} is not in {_listed(rule.services)}")
    if not matches_port(rule, request):
        misses.append(f"port {request.port} is not in {_listed(rule.ports or ())}")
    return misses


def _fate(rule: Rule, decision: Decision) -> str:
    """What came of a rule that matches."""
    if decision.reason not in (Reason.ALLOWED, Reason.DENIED_BY_RULE):
        return "would match, but no rule is asked"
    if rule.name == decision.rule:
        return "matches and decides"
    if rule.effect is Effect.ALLOW and decision.reason is Reason.DENIED_BY_RULE:
        return f"matches, but is shadowed by deny rule {decision.rule}"
    return f"matches, but rule {decision.rule} comes first"


def _listed(things: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, things))}]"
