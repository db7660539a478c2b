"""Start processes at a place of a world, through `enter`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.world import enter
from tests.world.enter import Place

REPO = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE

Stream = int | IO[str] | IO[bytes]


def spawn(
    place: Place,
    command: Sequence[str],
    *,
    stdin: Stream = DEVNULL,
    stdout: Stream = DEVNULL,
    stderr: Stream = DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Its pid is the command's own: `enter` execs. Runs in the repository, so that `python -m tests.apps.x` works."""
    return subprocess.Popen(
        entering(place, command),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        cwd=REPO,
        env=environment,
        # Ctrl-C goes to a whole foreground group: it is for the harness, which ends the others in its own order.
        start_new_session=True,
    )


def run(
    place: Place, command: Sequence[str], *, stdin: str = "", within_s: float = 60, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end. Beyond `within_s` it is killed and TimeoutExpired raised."""
    return subprocess.run(
        entering(place, command),
        input=stdin,
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=within_s,
        check=check,
        start_new_session=True,
    )


def entering(place: Place, command: Sequence[str]) -> list[str]:
    """The command line that enters `place` and becomes `command`."""
    start = [PYTHON, "-I", enter.__file__, "--netns", place.netns, "--cgroup", place.cgroup]
    if place.user is not None:
        start += ["--user", place.user]
    if place.own_ipc:
        start.append("--own-ipc")
    return [*start, "--", *command]
