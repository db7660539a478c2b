"""Whether a policy and a directory belong together: a name nobody has is a typo, and in a deny it fails open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from policy.fields import Problem
from policy.identity import SpiffeId
from policy.model import ANY, Directory, Effect, Pattern, Policy, Rule


def problems(policy: Policy, directory: Directory) -> list[Problem]:
    """What can mean nothing: services that do not exist, ports that none of the rule's services has."""
    found = [f"rule {rule.name}: {text}" for rule in policy.rules for text in _wrong(rule, directory)]
    return [Problem("policy", 0, text) for text in found]


def warnings(policy: Policy, directory: Directory, identities: Sequence[SpiffeId]) -> list[str]:
    """What may be meant, but more often is not. `identities` are this host's own."""
    return [f"rule {rule.name}: {text}" for rule in policy.rules for text in _doubtful(rule, directory, identities)]


def _wrong(rule: Rule, directory: Directory) -> Iterator[str]:
    for name in rule.services:
        if name != ANY and name not in directory.services:
            yield f"to: there is no service {name!r}{_hint(name, directory.services)}"
    known = [s for name, s in directory.services.items() if name in rule.services or ANY in rule.services]
    for ports in rule.ports or ():
        overlaps = any(ports.low <= own.high and own.low <= ports.high for service in known for own in service.ports)
        if known and not overlaps:
            yield f"ports: none of {', '.join(service.name for service in known)} has port {ports}"


def _doubtful(rule: Rule, directory: Directory, identities: Sequence[SpiffeId]) -> Iterator[str]:
    if rule.effect is Effect.DENY and not (rule.sources and rule.services):
        yield "denies nobody, because from or to is empty"
    for pattern in rule.sources:
        yield from _doubtful_source(pattern, directory, identities)


def _doubtful_source(pattern: Pattern, directory: Directory, identities: Sequence[SpiffeId]) -> Iterator[str]:
    hosts = {*directory.hosts, *(identity.host for identity in identities)}
    if pattern.host != ANY and pattern.host not in hosts:
        yield f"from: there is no host {pattern.host!r}{_hint(pattern.host, hosts)}"
    own = {identity.application for identity in identities if identity.host == pattern.host}
    if own and pattern.application != ANY and pattern.application not in own:
        yield f"from: this host has no application {pattern.application!r}{_hint(pattern.application, own)}"


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
