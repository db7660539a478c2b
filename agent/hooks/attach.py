"""Attaching the programs by pinned links: decide what is missing, then carry it out without a gap.

A link is created with BPF_F_ALLOW_MULTI semantics: it never locks another tool out, and a program of ours is swapped
under it (LINK_UPDATE) without a connect() going unseen. Whatever is killed at whatever step, what was pinned under our
names is found again, and a link that was not pinned yet went away with its descriptor.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar, assert_never

from agent import bpfcall
from agent.hooks.pins import Pins
from agent.hooks.problem import Problem
from agent.hooks.source import PROGRAMS

_T = TypeVar("_T")

AT_AGENT = "@agent"
_NEXT = "+next"  # a link on its way to replace the pinned one
# What the proxy's own sockets need: the place of a delivery, and the handing over of flows.
_AGENT_PROGRAMS = ("sockops", "connect4", "connect6")


@dataclass(frozen=True, slots=True)
class Place:
    """A cgroup to attach to: its directory, its path below the cgroup2 mount, its id."""

    directory: str
    path: str
    id: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """One attachment. `pin` is the name of its link."""

    pin: str
    program: str
    place: Place

    @property
    def attach_type(self) -> int:
        return PROGRAMS[self.program].attach_type


class Act(Enum):
    KEEP = "keep"
    CREATE = "create"
    UPDATE = "update"  # the link is where it should be and runs another program
    REPLACE = "replace"  # the link is dead or elsewhere
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Step:
    act: Act
    pin: str
    wanted: Wanted | None = None  # None only for REMOVE


def wanted_attachments(root: Place, own: Place) -> tuple[Wanted, ...]:
    """Everything at the root, and the agent's own sockets wherever they are. Never both above one another: programs of
    an ancestor and of a descendant all run, and the second connect program would meet the first one's rewriting."""
    if _below(root.path, own.path):
        raise Problem(
            f"the agent runs in cgroup {own.path} and exempts what is in it, which is all of {root.path}: nothing would"
            " be captured; start it in a cgroup of its own (its systemd unit does that)"
        )
    everywhere = tuple(Wanted(name, name, root) for name in PROGRAMS)
    if _below(own.path, root.path):
        return everywhere
    return everywhere + tuple(Wanted(name + AT_AGENT, name, own) for name in _AGENT_PROGRAMS)


def plan(
    wanted: Iterable[Wanted], found: Mapping[str, bpfcall.LinkInfo], programs: Mapping[str, int]
) -> tuple[Step, ...]:
    """`found` has the pinned links by name, `programs` the ids of the programs to run. Names that are none of ours are
    somebody else's and stay as they are."""
    by_pin = {each.pin: each for each in wanted}
    steps = [Step(_act(each, found.get(pin), programs[each.program]), pin, each) for pin, each in by_pin.items()]
    stale = [pin for pin in found if pin in ours() and pin not in by_pin]
    return (*steps, *(Step(Act.REMOVE, pin) for pin in stale))


def ours() -> tuple[str, ...]:
    """Every name a link of ours can have, in the order of detaching: capture first."""
    names = (*PROGRAMS, *(name + AT_AGENT for name in _AGENT_PROGRAMS))
    return tuple(reversed([*names, *(name + _NEXT for name in names)]))


def carry_out(steps: Iterable[Step], pins: Pins) -> list[str]:
    """What was done, one line for each step that did something."""
    done = []
    for step in steps:
        if step.act is not Act.KEEP:
            _carry_out(step, pins)
            done.append(_say(step))
    return done


def settle(pins: Pins) -> None:
    """Finish a replacement that was killed between its two steps: the newer link is the one that was meant."""
    for path in pins.links.glob("*" + _NEXT):
        if path.name in ours():
            path.rename(path.with_name(path.name.removesuffix(_NEXT)))


def pinned_links(pins: Pins) -> dict[str, bpfcall.LinkInfo]:
    found = {}
    for name in ours():
        fd = _get(pins.links / name)
        if fd is not None:
            found[name] = _with(fd, bpfcall.link_info)
    return found


def pinned_programs(directory: Path) -> dict[str, int]:
    """Program name to kernel id."""
    fds = {name: _get(directory / name) for name in PROGRAMS}
    return {name: _with(fd, bpfcall.program_id) for name, fd in fds.items() if fd is not None}


def promote(pins: Pins) -> None:
    """Make the freshly compiled programs the ones to run. Links go on with the old ones until the next plan."""
    for name in PROGRAMS:
        (pins.staging / name).rename(pins.programs / name)
    clear(pins.staging)


def clear(directory: Path) -> None:
    """Remove a directory of pinned programs; names that are none of ours stay, and with them the directory."""
    for name in PROGRAMS:
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def count_attached(wanted: Iterable[Wanted], programs: Mapping[str, int]) -> dict[str, int]:
    """How often each program runs at its cgroup, by pin name. One is right."""
    counts = {}
    for each in wanted:
        fd = os.open(each.place.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            counts[each.pin] = bpfcall.attached_programs(fd, each.attach_type).count(programs.get(each.program, 0))
        finally:
            os.close(fd)
    return counts


def _act(wanted: Wanted, found: bpfcall.LinkInfo | None, program: int) -> Act:
    if found is None:
        return Act.CREATE
    if found.cgroup != wanted.place.id or found.attach_type != wanted.attach_type:
        return Act.REPLACE
    return Act.KEEP if found.program == program else Act.UPDATE


def _carry_out(step: Step, pins: Pins) -> None:
    path = pins.links / step.pin
    if step.wanted is None:
        path.unlink()
        return
    program = bpfcall.get(str(pins.programs / step.wanted.program))
    try:
        match step.act:
            case Act.CREATE:
                _create(step.wanted, program, path)
            case Act.REPLACE:
                # The new one first: for a moment both may run, and then connects are refused; the other way round
                # they would be plaintext.
                following = path.with_name(path.name + _NEXT)
                _create(step.wanted, program, following)
                following.rename(path)
            case Act.UPDATE:
                link = bpfcall.get(str(path))
                _with(link, lambda fd: bpfcall.update_link(fd, program))
            case Act.KEEP | Act.REMOVE:
                pass
            case _:
                assert_never(step.act)
    finally:
        os.close(program)


def _create(wanted: Wanted, program: int, path: Path) -> None:
    cgroup = os.open(wanted.place.directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        link = bpfcall.create_link(program, cgroup, wanted.attach_type)
    except OSError as error:
        raise Problem(_refused(wanted, error)) from error
    finally:
        os.close(cgroup)
    _with(link, lambda fd: bpfcall.pin(fd, str(path)))


def _refused(wanted: Wanted, error: OSError) -> str:
    where = f"cannot attach {wanted.program} to cgroup {wanted.place.path}"
    if error.errno == errno.EPERM:
        # kernel/bpf/cgroup.c, hierarchy_allows_attach: a program attached with flags 0 there or above excludes others.
        return (
            f"{where}: another tool holds this hook exclusively there or above (or CAP_NET_ADMIN is missing);"
            " find it with `bpftool cgroup tree` and attach it with BPF_F_ALLOW_MULTI instead"
        )
    return f"{where}: {error.strerror}; see `bpftool cgroup tree`"


def _say(step: Step) -> str:
    where = f" at cgroup {step.wanted.place.path}" if step.wanted else ""
    return f"{step.act.value} {step.pin}{where}"


def _below(path: str, root: str) -> bool:
    """That cgroup or below it, by whole segments."""
    return root == "/" or path == root or path.startswith(root + "/")


def _get(path: Path) -> int | None:
    try:
        return bpfcall.get(str(path))
    except FileNotFoundError:
        return None


def _with(fd: int, use: Callable[[int], _T]) -> _T:
    try:
        return use(fd)
    finally:
        os.close(fd)
