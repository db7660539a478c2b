"""The names of everything a world makes, from the world's name alone: that is what lets a later run sweep up after a
crashed one. Every name starts with `underpass-`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PREFIX = "underpass-"
RUN = Path("/run")
INTERFACE = "eth0"  # each host's end of the veth pair, inside its own namespace

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_MOUNT_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


def checked(name: str) -> str:
    """The name itself; ValueError where it could point outside of what is ours (`..`, `/`, nothing at all)."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a name of lower-case letters, digits and dashes, got {name!r}")
    return name


def netns(world: str, host: str) -> str:
    return f"{PREFIX}{checked(world)}-{checked(host)}"


def run_dir(world: str) -> Path:
    return RUN / f"{PREFIX}{checked(world)}"


def cgroup(world: str) -> Path:
    """The top of the world's cgroup subtree."""
    return cgroup_mount() / f"{PREFIX}{checked(world)}"


@cache
def cgroup_mount() -> Path:
    """Where cgroup v2 is mounted: /sys/fs/cgroup on most hosts, elsewhere where version 1 is still around."""
    for _, target, kind in mounts():
        if kind == "cgroup2":
            return target
    raise FileNotFoundError("cgroup v2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def mounts() -> list[tuple[str, Path, str]]:
    """Source, target and type of every mount."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [(source, Path(_unescape(target)), kind) for source, target, kind, *_ in map(str.split, lines)]


def _unescape(text: str) -> str:
    for escape, character in _MOUNT_ESCAPES.items():
        text = text.replace(escape, character)
    return text
