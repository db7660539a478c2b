"""The decision: deny by default, and a matching deny wins over every allow, whatever their order."""

from __future__ import annotations

from policy.model import ANY, DEFAULT_RULE, Decision, Effect, Policy, Reason, Request, Rule, Verdict


def decide(policy: Policy | None, trust_domain: str, request: Request) -> Decision:
    """Decide one request within one mesh; names the first matching deny, else the first matching allow."""
    refusal = refused_before_rules(policy, trust_domain, request)
    if policy is None or refusal is not None:
        return Decision(Verdict.DENY, DEFAULT_RULE, refusal or Reason.NO_POLICY)
    denied = first_match(policy, Effect.DENY, trust_domain, request)
    if denied is not None:
        return Decision(Verdict.DENY, denied.name, Reason.DENIED_BY_RULE)
    allowed = first_match(policy, Effect.ALLOW, trust_domain, request)
    if allowed is not None:
        return Decision(Verdict.ALLOW, allowed.name, Reason.ALLOWED)
    return Decision(Verdict.DENY, DEFAULT_RULE, Reason.NO_MATCHING_RULE)


def refused_before_rules(policy: Policy | None, trust_domain: str, request: Request) -> Reason | None:
    """Why no rule is even asked, or None."""
    if policy is None:
        return Reason.NO_POLICY
    if request.source is None:
        return Reason.NO_IDENTITY
    if trust_domain != request.source.trust_domain or trust_domain != request.destination.trust_domain:
        return Reason.FOREIGN_TRUST_DOMAIN
    return None


def first_match(policy: Policy, effect: Effect, trust_domain: str, request: Request) -> Rule | None:
    return next((rule for rule in policy.rules if rule.effect is effect and matches(rule, trust_domain, request)), None)


def matches(rule: Rule, trust_domain: str, request: Request) -> bool:
    return (
        matches_service(rule, request) and matches_port(rule, request) and matches_source(rule, trust_domain, request)
    )


def matches_source(rule: Rule, trust_domain: str, request: Request) -> bool:
    source = request.source
    return source is not None and any(pattern.matches(source, trust_domain) for pattern in rule.sources)


def matches_service(rule: Rule, request: Request) -> bool:
    return ANY in rule.services or request.service in rule.services


def matches_port(rule: Rule, request: Request) -> bool:
    return rule.ports is None or any(request.port in ports for ports in rule.ports)
