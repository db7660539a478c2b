"""Where the hooks of one configuration live: which cgroups, which pins, which limits."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from agent import host
from agent.config import Config
from agent.hooks.attach import Place
from agent.hooks.pins import Pins
from agent.hooks.problem import Problem
from agent.records import Settings

CAPTURE_V4 = IPv4Address("127.0.0.1")
CAPTURE_V6 = IPv6Address("::1")


@dataclass(frozen=True, slots=True)
class Site:
    pins: Pins
    state_dir: Path
    mount: str  # of cgroup v2
    root: Place  # everything in and below it is captured
    own: Place  # of the process that asks; the agent's, when it is the hooks role
    max_flows: int
    capture_port: int


def find_site(config: Config) -> Site:
    mount = host.cgroup_mount()
    if mount is None:
        raise Problem("cgroup v2 is not mounted; mount it (mount -t cgroup2 none /sys/fs/cgroup/unified)")
    if not host.is_whole_hierarchy(mount):
        raise Problem(f"{mount} shows a cgroup namespace and not the host's; start the agent outside of containers")
    root = (config.cgroup_root or mount).rstrip("/")
    if root != mount and not root.startswith(mount + "/"):
        raise Problem(f"cgroup_root {root} is not below {mount}, where cgroup v2 is mounted; correct it or omit it")
    return Site(
        pins=Pins(Path(config.bpffs)),
        state_dir=Path(config.state_dir),
        mount=mount,
        root=place(mount, root.removeprefix(mount) or "/"),
        own=place(mount, host.own_cgroup()),
        max_flows=config.capture.max_flows,
        capture_port=config.capture.port,
    )


def place(mount: str, path: str) -> Place:
    directory = mount if path == "/" else mount + path
    try:
        return Place(directory, path, host.cgroup_id(directory))
    except OSError as error:
        raise Problem(f"cannot use cgroup {directory}: {error.strerror}; make it, or correct cgroup_root") from error


def settings(site: Site, netns: int) -> Settings:
    return Settings(
        netns=netns,
        exempt_cgroup=site.own.id,
        exempt_level=host.cgroup_level(site.own.path),
        capture_v4=CAPTURE_V4,
        capture_v6=CAPTURE_V6,
        capture_port=site.capture_port,
    )
