"""`python -m tests.demo.on HOST APPLICATION -- COMMAND...`: a command as an application of a running demo.

Becomes the command: input, output, signals and exit status are its own. It ends with the demo at the latest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.demo import lock
from tests.demo.stage import APPLICATIONS, NAME
from tests.world import names
from tests.world.enter import NOT_STARTED, Place, enter

USAGE = "usage: ./run on HOST APPLICATION -- COMMAND..."
NOT_POSSIBLE = 2


def main(arguments: Sequence[str]) -> int:
    try:
        place, command = read(arguments)
    except ValueError as problem:
        print(f"on: {problem}", file=sys.stderr)
        return NOT_POSSIBLE
    try:
        enter(place)
        os.execvp(command[0], command)
    except OSError as problem:
        print(f"on: cannot start {command[0]}: {problem}", file=sys.stderr)
        return NOT_STARTED


def read(arguments: Sequence[str]) -> tuple[Place, list[str]]:
    """Where to go and what to run there; ValueError says what is wrong, and what would be right."""
    host, application, *command = [*arguments[:2], *_command(arguments[2:])]
    if host not in APPLICATIONS:
        raise ValueError(f"no host {host!r}; there are {' and '.join(APPLICATIONS)}")
    if application not in APPLICATIONS[host]:
        raise ValueError(f"no application {application!r} on host {host}; there are {', '.join(APPLICATIONS[host])}")
    if os.geteuid() != 0:
        raise ValueError("needs root, to enter the namespace and the cgroup; start it as root")
    if not lock.held():
        raise ValueError("no demo is running; start one in another terminal: ./run demo --stay")
    place = Place(names.netns(NAME, host), str(names.cgroup(NAME) / host / application))
    if not Path(place.cgroup).exists():
        raise ValueError("the demo is still starting; try again in a moment")
    return place, command


def _command(rest: Sequence[str]) -> Sequence[str]:
    command = rest[1:] if rest[:1] == ["--"] else rest
    if not command:
        raise ValueError(USAGE)
    return command


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
