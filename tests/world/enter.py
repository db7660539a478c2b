"""Become a process of a world, then exec: `python -m tests.world.enter --netns X --cgroup DIR [--user U] -- COMMAND`.

A program of its own and not a preexec_fn: the harness has threads, and Python between fork and exec can deadlock there.
The order matters: a socket belongs for life to the cgroup and namespace its process was in when it was made, so the
command must find itself in both before its first instruction. Uses nothing but the standard library: it is also run
as a plain file, isolated, so that it costs as little as a start of Python can.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import sys
from collections.abc import Sequence
from dataclasses import dataclass

CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
NOT_STARTED = 127  # what a shell answers for a command it cannot start


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs. `own_ipc`: System V memory that dies with it, which a killed PostgreSQL would leave."""

    netns: str
    cgroup: str
    user: str | None = None
    own_ipc: bool = False


def enter(place: Place) -> None:
    """Move this very process. Root is given up last, because everything before needs it."""
    with open(os.path.join(place.cgroup, "cgroup.procs"), "w") as procs:
        procs.write("0")  # 0 is whoever writes
    _set_netns(place.netns)
    if place.own_ipc:
        _call("unshare", CLONE_NEWIPC)
    if place.user is not None:
        _set_user(place.user)


def _set_netns(name: str) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", descriptor, CLONE_NEWNET)  # os.setns came with Python 3.12
    finally:
        os.close(descriptor)


def _set_user(name: str) -> None:
    account = pwd.getpwnam(name)
    os.initgroups(account.pw_name, account.pw_gid)
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    os.environ.update(HOME=account.pw_dir, USER=name, LOGNAME=name)


def _call(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.world.enter")
    parser.add_argument("--netns", required=True)
    parser.add_argument("--cgroup", required=True)
    parser.add_argument("--user")
    parser.add_argument("--own-ipc", action="store_true")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    try:
        enter(Place(given.netns, given.cgroup, given.user, given.own_ipc))
        os.execvp(given.command[0], given.command)
    except (OSError, KeyError) as error:
        print(f"enter: cannot start {given.command[0]}: {error}", file=sys.stderr)
        return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
