"""What the kernel's tables should hold, and how to get there without a moment that lets protected traffic pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent import records
from agent.bpfcall import Map
from agent.hooks.problem import Problem
from agent.identity import Caller, ExeFile, IdentityRule, Match, matches
from agent.records import Address
from agent.snapshot import Snapshot
from policy.compile import Table, VerdictKind, compile_table
from policy.identity import SpiffeId
from policy.load import load_directory, load_policies
from policy.model import Policy

Entries = dict[bytes, bytes]

_KINDS = {
    VerdictKind.ASK: records.VerdictKind.ASK,
    VerdictKind.ALLOW: records.VerdictKind.ALLOW,
    VerdictKind.DENY: records.VerdictKind.DENY,
}
_SOME_FILE = ExeFile(0, 0)  # which file a rule's path names can change at any time: only the proxy looks


@dataclass(frozen=True, slots=True)
class Content:
    services: Entries
    callers: Entries
    verdicts: Entries


def read_policy(snapshot: Snapshot) -> Policy:
    """Raises policy.fields.Invalid."""
    return load_policies(snapshot.policies)


def read_snapshot(snapshot: Snapshot, host: str, trust_domain: str, rules: Sequence[IdentityRule]) -> Table:
    """Raises policy.fields.Invalid with everything that is wrong in the snapshot."""
    policy = read_policy(snapshot)
    directory = load_directory(snapshot.services[1], snapshot.services[0])
    applications = dict.fromkeys(rule.application for rule in rules)
    identities = [SpiffeId(trust_domain, host, application) for application in applications]
    return compile_table(policy, trust_domain, directory, identities)


def service_entries(
    table: Table, sources: Mapping[Address, Address | None], local: Collection[tuple[Address, int]] = ()
) -> Entries:
    """`local`: what may be dialled directly."""
    return {
        records.service_key(each.address, each.port): records.service_value(
            each.service_id, sources.get(each.address), (each.address, each.port) in local
        )
        for each in table.services
    }


def verdict_entries(table: Table) -> Entries:
    """ASK is left out: it is what the kernel does without an entry."""
    return {
        records.verdict_key(*key): records.verdict_value(_KINDS[verdict.kind], verdict.rule_id)
        for key, verdict in table.verdicts.items()
        if verdict.kind is not VerdictKind.ASK
    }


def caller_ids(table: Table) -> dict[str, int]:
    """Application to caller id."""
    return {identity.application: number for number, identity in table.callers.items()}


def caller_entries(cgroup: int, path: str, rules: Sequence[IdentityRule], ids: Mapping[str, int]) -> Entries:
    """One cgroup's entries: one for any user, and one for each user that the rules treat differently.

    The kernel looks for (cgroup, uid) first and then for (cgroup, any). Where only the proxy can tell, there is no
    entry, or an explicit CALLER_UNKNOWN for a user whose cgroup has a general one.
    """
    general = _caller(Caller(path, records.ANY_UID), rules, ids)
    entries = {} if general == records.CALLER_UNKNOWN else {records.caller_key(cgroup): _number(general)}
    for uid, theirs in _by_uid(rules).items():
        if all(matches(rule.match, Caller(path, uid), unknown_files(rules)) is Match.NO for rule in theirs):
            continue  # the usual case, and the cheap one: on this cgroup no rule treats this user differently
        particular = _caller(Caller(path, uid), rules, ids)
        if particular != general:
            entries[records.caller_key(cgroup, uid)] = _number(particular)
    return entries


def _by_uid(rules: Sequence[IdentityRule]) -> dict[int, list[IdentityRule]]:
    found: dict[int, list[IdentityRule]] = {}
    for rule in rules:
        if isinstance(rule.match.uid, int):
            found.setdefault(rule.match.uid, []).append(rule)
    return found


def unknown_files(rules: Sequence[IdentityRule]) -> dict[str, ExeFile]:
    """Makes every rule that asks for an executable unsure, and so everybody whom it may fit."""
    return {rule.match.exe: _SOME_FILE for rule in rules if rule.match.exe is not None}


def _caller(caller: Caller, rules: Sequence[IdentityRule], ids: Mapping[str, int]) -> int:
    files = unknown_files(rules)
    found = {rule.application: set[Match]() for rule in rules}
    for rule in rules:
        found[rule.application].add(_match(rule, caller, files))
    fitting = [application for application, answers in found.items() if Match.YES in answers]
    if any(Match.UNSURE in answers for answers in found.values()) or len(fitting) > 1:
        return records.CALLER_UNKNOWN
    return ids[fitting[0]] if fitting else records.CALLER_NOBODY


def _match(rule: IdentityRule, caller: Caller, files: Mapping[str, ExeFile]) -> Match:
    selector = rule.match
    if not isinstance(selector.uid, str):
        return matches(selector, caller, files)
    # A user name without a number today may get one tomorrow: that caller is not nobody yet.
    would = matches(replace(selector, uid=caller.uid), caller, files)
    return Match.NO if would is Match.NO else Match.UNSURE


def fit(content: Content, callers: int, verdicts: int) -> tuple[Content, list[str]]:
    """Leave out what the kernel can do without when a table is too small, and say so: no entry means that the proxy is
    asked, which is slower and never wrong. Services are not optional: see write()."""
    problems = []
    if len(content.callers) > callers:
        nobody = _number(records.CALLER_NOBODY)
        content = replace(content, callers=_first(content.callers, callers, lambda value: value == nobody))
        problems.append(f"the kernel table has room for {callers} callers: the proxy is asked about the others")
    if len(content.verdicts) > verdicts:
        content = replace(content, verdicts=_first(content.verdicts, verdicts, _is_no_refusal))
        problems.append(f"the kernel table has room for {verdicts} verdicts: the proxy is asked about the others")
    return content, problems


class Tables:
    """The three maps. Remembers what it wrote, so that a small change takes few system calls."""

    def __init__(self, services: Map, callers: Map, verdicts: Map) -> None:
        self._services, self._callers, self._verdicts = services, callers, verdicts
        self._written: Content | None = None

    def write(self, content: Content, capacity: int) -> int:
        """Make the maps hold `content`; how many entries changed. Problem, and nothing written, when it cannot fit.

        The order: a destination is captured before anything is known about it, and stops being captured only when
        everything else is in place. In between an entry may be missing, and missing means: ask the proxy.
        """
        if len(content.services) > capacity:
            needed = len(content.services)
            raise Problem(f"services need {needed} kernel entries and there are {capacity}; narrow their port ranges")
        old = self._written or self._read()
        self._written = None  # not known any more if this fails half-way
        changed = _put(self._services, old.services, content.services)
        for table, before, after in (
            (self._verdicts, old.verdicts, content.verdicts),
            (self._callers, old.callers, content.callers),
        ):
            changed += _drop(table, before, after)  # first, to make room
            changed += _put(table, before, after)
        changed += _drop(self._services, old.services, content.services)
        self._written = content
        return changed

    def _read(self) -> Content:
        return Content(dict(self._services.items()), dict(self._callers.items()), dict(self._verdicts.items()))


def _put(table: Map, before: Entries, after: Entries) -> int:
    changed = [key for key, value in after.items() if before.get(key) != value]
    for key in changed:
        try:
            table.update(key, after[key])
        except OSError as error:
            raise Problem(f"a kernel table took no more entries: {error.strerror}; it is tried again") from error
    return len(changed)


def _drop(table: Map, before: Entries, after: Entries) -> int:
    return sum(table.delete(key) for key in before.keys() - after.keys())


def _first(entries: Entries, count: int, dispensable: Callable[[bytes], bool]) -> Entries:
    return dict(sorted(entries.items(), key=lambda entry: dispensable(entry[1]))[:count])


def _is_no_refusal(value: bytes) -> bool:
    return bool(records.VERDICT.unpack(value)[1] != records.VerdictKind.DENY)


def _number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def addresses(table: Table) -> Iterable[Address]:
    """Every address that is captured, once."""
    return dict.fromkeys(each.address for each in table.services)
