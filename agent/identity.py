"""Who is calling: cgroup, systemd unit, user and executable of a process to the one application they stand for.

When unsure, nobody: a caller that no rule or more than one application fits, or whose executable could not be read
where a rule asks for it, has no identity, and policy denies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from policy.identity import SpiffeId

ANY = "*"
UNIT_SUFFIXES = (".service", ".scope")


@dataclass(frozen=True, slots=True)
class ExeFile:
    """An executable as the kernel knows it. Paths lie: a mount namespace or a rename shows any name for any file."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Caller:
    """`cgroup` is the path below the cgroup2 mount; `exe` None means that it was not asked for or could not be read."""

    cgroup: str
    uid: int
    exe: ExeFile | None = None


@dataclass(frozen=True, slots=True)
class Selector:
    """What a caller must be; everything given must match, and None asks nothing (but a selector without any
    question matches nobody). `cgroup` is a path in segments.

    A `uid` that is still a user name matches nobody: see `with_uids`.
    """

    cgroup: tuple[str, ...] | None = None
    unit: str | None = None
    uid: int | str | None = None
    exe: str | None = None


@dataclass(frozen=True, slots=True)
class IdentityRule:
    application: str
    match: Selector


@dataclass(frozen=True, slots=True)
class Unidentified:
    """No identity; `reason` tells an operator what to look at."""

    reason: str


class Match(Enum):
    YES = "yes"
    NO = "no"
    UNSURE = "unsure"


def identify(
    rules: Sequence[IdentityRule],
    caller: Caller,
    host: str,
    trust_domain: str,
    files: Mapping[str, ExeFile] | None = None,
) -> SpiffeId | Unidentified:
    """The caller's identity on this host. `files` has what is now at the rules' `exe` paths; absent = no such file."""
    found = {match: _applications(rules, caller, files or {}, match) for match in Match}
    fitting = list(dict.fromkeys(found[Match.YES] + found[Match.UNSURE]))
    if not fitting:
        return Unidentified(f"no identity rule matches cgroup {caller.cgroup!r}, uid {caller.uid}; add one")
    if len(fitting) > 1:
        return Unidentified(f"ambiguous: cgroup {caller.cgroup!r}, uid {caller.uid} fits {' and '.join(fitting)}")
    if not found[Match.YES]:
        return Unidentified(f"executable unknown: {fitting[0]} asks for one; see whether the process still runs")
    return SpiffeId(trust_domain, host, fitting[0])


def needs_exe(rules: Iterable[IdentityRule]) -> bool:
    """Whether callers' executables have to be looked up at all."""
    return any(rule.match.exe is not None for rule in rules)


def with_uids(rules: Iterable[IdentityRule], uids: Mapping[str, int]) -> tuple[IdentityRule, ...]:
    """The rules with user names replaced by their numbers; names without a number stay and match nobody."""
    return tuple(replace(rule, match=_with_uid(rule.match, uids)) for rule in rules)


def matches(selector: Selector, caller: Caller, files: Mapping[str, ExeFile]) -> Match:
    segments = _segments(caller.cgroup)
    certain = (
        selector != Selector()
        and (selector.cgroup is None or _below(segments, selector.cgroup))
        and (selector.unit is None or selector.unit == _unit(segments))
        and (selector.uid is None or selector.uid == caller.uid)
    )
    wanted = files.get(selector.exe) if selector.exe is not None else None
    if not certain or (selector.exe is not None and wanted is None):
        return Match.NO
    if selector.exe is not None and caller.exe is None:
        return Match.UNSURE
    return Match.YES if wanted is None or wanted == caller.exe else Match.NO


def _applications(
    rules: Sequence[IdentityRule], caller: Caller, files: Mapping[str, ExeFile], wanted: Match
) -> list[str]:
    return [rule.application for rule in rules if matches(rule.match, caller, files) is wanted]


def _with_uid(selector: Selector, uids: Mapping[str, int]) -> Selector:
    return replace(selector, uid=uids.get(selector.uid, selector.uid)) if isinstance(selector.uid, str) else selector


def _segments(cgroup: str) -> tuple[str, ...]:
    """Segments below the mount; none for a path outside of it ("/../x": another cgroup namespace) or no path at all."""
    segments = tuple(cgroup.removeprefix("/").split("/"))
    if not cgroup.startswith("/") or any(segment in ("", ".", "..") for segment in segments):
        return ()
    return segments


def _below(segments: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """That cgroup or below it, by whole segments: /bank/ledger2 is not below /bank/ledger."""
    if not wanted or len(segments) < len(wanted):
        return False
    return all(want in (ANY, segment) for want, segment in zip(wanted, segments, strict=False))


def _unit(segments: tuple[str, ...]) -> str | None:
    """The systemd unit that a cgroup belongs to: the first segment from the root that is not a slice.

    Only the first, and only below slices: whoever was delegated a cgroup (a user's service manager, a container) makes
    any name below its own, and "/user.slice/user@1000.service/postgresql.service" must not pass for the database.
    Slices cannot be delegated (systemd.resource-control(5), Delegate=), so everything above the unit is systemd's.
    """
    first = next((segment for segment in segments if not segment.endswith(".slice")), "")
    return first if first.endswith(UNIT_SUFFIXES) else None
