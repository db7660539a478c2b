"""The kernel's verdict table: what decide() would say, worked out beforehand for every caller and service.

Ids are hashes of names and not counters: pinned maps outlive the agent, and a counter would give an old entry a new
meaning after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from policy.evaluate import decide
from policy.fields import Invalid, IPAddress, Problem
from policy.identity import SpiffeId
from policy.model import DEFAULT_RULE, Decision, Directory, Policy, Request, SameNode, Service, Verdict

UNKNOWN = 0  # not worked out yet
NOBODY = 1  # as a caller: known, but without an identity


class VerdictKind(Enum):
    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"  # capture, and let the proxy decide this one connection


@dataclass(frozen=True, slots=True)
class KernelVerdict:
    """`rule_id` is UNKNOWN for ASK."""

    kind: VerdictKind
    rule_id: int


@dataclass(frozen=True, slots=True)
class CapturedAddress:
    """`answers` is who has to listen at this very address and port; None where nobody has to: a virtual address, or an
    endpoint with another port than the one dialled."""

    address: IPAddress
    port: int
    service_id: int
    answers: SpiffeId | None


@dataclass(frozen=True, slots=True)
class Table:
    """Everything the hooks need to know; verdicts are keyed by (caller id, service id)."""

    same_node: SameNode
    callers: dict[int, SpiffeId]
    services: tuple[CapturedAddress, ...]
    service_names: dict[int, str]
    rules: dict[int, str]
    verdicts: dict[tuple[int, int], KernelVerdict]


def compile_table(policy: Policy | None, trust_domain: str, directory: Directory, callers: Sequence[SpiffeId]) -> Table:
    """Work out every verdict. Raises Invalid when two names share an id, which renaming one of them cures."""
    by_uri = {caller.uri: caller for caller in callers}
    known = {number: by_uri[uri] for number, uri in _ids("caller", by_uri).items()}
    names = _ids("service", directory.services)
    rules = _ids("rule", [DEFAULT_RULE, *(rule.name for rule in (policy.rules if policy else ()))])
    who: dict[int, SpiffeId | None] = {NOBODY: None, **known}
    return Table(
        # Without a policy nothing is allowed, and it does not matter.
        same_node=policy.same_node if policy else SameNode.MTLS,
        callers=known,
        services=tuple(_captured(directory, names, trust_domain)),
        service_names=names,
        rules=rules,
        verdicts={
            (caller_id, service_id): _verdict(policy, trust_domain, directory.services[name], caller)
            for caller_id, caller in who.items()
            for service_id, name in names.items()
        },
    )


def stable_id(kind: str, name: str) -> int:
    """The same for the same name on every host and after every restart."""
    return int.from_bytes(hashlib.sha256(f"{kind}:{name}".encode()).digest()[:4], "big")


def _ids(kind: str, names: Iterable[str]) -> dict[int, str]:
    ids: dict[int, str] = {}
    problems = []
    for name in names:
        number = stable_id(kind, name)
        if number in (UNKNOWN, NOBODY):
            problems.append(Problem(kind, 0, f"{name!r} hashes to the reserved id {number}; rename it"))
        elif ids.setdefault(number, name) != name:
            problems.append(Problem(kind, 0, f"{name!r} and {ids[number]!r} share the id {number}; rename one"))
    if problems:
        raise Invalid(problems)
    return ids


def _captured(directory: Directory, names: dict[int, str], trust_domain: str) -> Iterator[CapturedAddress]:
    for service_id, name in names.items():
        service = directory.services[name]
        for address in service.captured:
            endpoint = next((each for each in service.endpoints if each.address == address), None)
            there = _identity(trust_domain, endpoint.host, service) if endpoint else None
            for ports in service.ports:
                for port in range(ports.low, ports.high + 1):
                    answers = there if endpoint and endpoint.port in (None, port) else None
                    yield CapturedAddress(address, port, service_id, answers)


def _verdict(policy: Policy | None, trust_domain: str, service: Service, caller: SpiffeId | None) -> KernelVerdict:
    decisions = set(_decisions(policy, trust_domain, service, caller))
    verdicts = {decision.verdict for decision in decisions}
    rules = {decision.rule for decision in decisions}
    rule_id = stable_id("rule", rules.pop()) if len(rules) == 1 else UNKNOWN
    if len(verdicts) != 1 or rule_id == UNKNOWN:  # without one rule for all of it only the proxy can name the one
        return KernelVerdict(VerdictKind.ASK, UNKNOWN)
    return KernelVerdict(VerdictKind.ALLOW if Verdict.ALLOW in verdicts else VerdictKind.DENY, rule_id)


def _decisions(
    policy: Policy | None, trust_domain: str, service: Service, caller: SpiffeId | None
) -> Iterator[Decision]:
    for host in dict.fromkeys(endpoint.host for endpoint in service.endpoints):
        destination = _identity(trust_domain, host, service)
        for port in _telling_ports(policy, service):
            yield decide(policy, trust_domain, Request(caller, destination, service.name, port))


def _telling_ports(policy: Policy | None, service: Service) -> list[int]:
    """Decisions change only where a port range of a rule begins or has ended: asking there asks for every port."""
    rules = policy.rules if policy else ()
    edges = {edge for rule in rules for ports in rule.ports or () for edge in (ports.low, ports.high + 1)}
    return sorted({ports.low for ports in service.ports} | {e for e in edges if any(e in p for p in service.ports)})


def _identity(trust_domain: str, host: str, service: Service) -> SpiffeId:
    try:
        return SpiffeId(trust_domain, host, service.application)
    except ValueError as error:  # names that are fine alone may be too long together
        raise Invalid([Problem("service", 0, f"{service.name!r} on host {host!r}: {error}")]) from error
