"""Network namespaces of a world: make two and join them by a veth pair, remove them. Nothing is ever made outside."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.world.names import INTERFACE, PREFIX

PREFIX_V4, PREFIX_V6 = 24, 64


@dataclass(frozen=True, slots=True)
class End:
    """One side of the pair."""

    netns: str
    v4: str
    v6: str


def create(ends: tuple[End, End]) -> None:
    for end in ends:
        _ip("netns", "add", end.netns)
        _ip("-n", end.netns, "link", "set", "lo", "up")
    # Both ends are born inside their namespaces: a crash here leaves no device in ours.
    pair = ["name", INTERFACE, "netns", ends[0].netns, "type", "veth", "peer", "name", INTERFACE]
    _ip("link", "add", *pair, "netns", ends[1].netns)
    for end in ends:
        _ip("-n", end.netns, "address", "add", f"{end.v4}/{PREFIX_V4}", "dev", INTERFACE)
        # Duplicate address detection would make the address unusable for its first second.
        _ip("-n", end.netns, "address", "add", f"{end.v6}/{PREFIX_V6}", "dev", INTERFACE, "nodad")
        _ip("-n", end.netns, "link", "set", INTERFACE, "up")


def path(netns: str) -> Path:
    return Path("/run/netns") / netns


def exists(netns: str) -> bool:
    return path(netns).exists()


def listed(prefix: str) -> list[str]:
    """Namespaces whose name starts so."""
    directory = Path("/run/netns")
    return sorted(entry.name for entry in directory.glob("*") if entry.name.startswith(prefix))


def remove(netns: str) -> None:
    """Fine if it is not there. The veth pair goes with whichever end goes first."""
    if not netns.startswith(PREFIX):
        raise ValueError(f"{netns} is not a namespace of a world; worlds name theirs {PREFIX}*")
    if exists(netns):
        _ip("netns", "delete", netns)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
