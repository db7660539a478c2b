"""What this host is: its cgroups, users, executables, addresses and namespaces. Reads only; no packet is sent."""

from __future__ import annotations

import os
import pwd
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from agent import netlink
from agent.identity import ExeFile
from agent.records import Address

_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, kernel 5.14
_ROOT_INODE = 1  # of a cgroup hierarchy; inside a cgroup namespace the mount shows another one
_ANY_V4, _ANY_V6 = IPv4Address(0), IPv6Address(0)


def cgroup_mount(mounts: str | None = None) -> str | None:
    """Where cgroup v2 is mounted; None when it is not. The first mount wins: later ones may be a container's."""
    text = Path("/proc/self/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == "cgroup2":
            return _unescape(fields[1])
    return None


def is_whole_hierarchy(mount: str) -> bool:
    """Whether the mount shows the host's cgroups and not those of a cgroup namespace."""
    return os.stat(mount).st_ino == _ROOT_INODE


def own_cgroup(listing: str | None = None) -> str:
    """This process's cgroup below the cgroup2 mount, "/" for the root."""
    text = Path("/proc/self/cgroup").read_text(encoding="utf-8") if listing is None else listing
    for line in text.splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    raise LookupError("this process is in no cgroup of cgroup v2; mount cgroup2")


def cgroup_level(path: str) -> int:
    """Depth below the root, as bpf_get_current_ancestor_cgroup_id counts."""
    return len([segment for segment in path.split("/") if segment])


def cgroup_id(directory: str) -> int:
    """The kernel's id is the inode number of the directory (fs/kernfs, since 5.5 on 64-bit machines)."""
    return os.stat(directory).st_ino


def cgroups(mount: str) -> dict[int, str]:
    """Every cgroup, id to path below the mount. One that goes away meanwhile is left out."""
    found = {cgroup_id(mount): "/"}
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(mount + parent) as entries:
                children = {entry.inode(): f"{parent}/{entry.name}" for entry in entries if entry.is_dir()}
        except OSError:
            continue
        found |= children
        waiting += children.values()
    return found


def cgroup_members(path: str) -> list[int]:
    """The processes in this very cgroup, by its path below the mount."""
    mount = cgroup_mount()
    if mount is None:
        return []
    text = Path(f"{mount}{path.rstrip('/')}/cgroup.procs").read_text(encoding="ascii")
    return [int(line) for line in text.split()]


def source_address(destination: Address) -> Address | None:
    """The address this host would use toward `destination`, by its routing table; None when there is no route."""
    from pyroute2 import IPRoute, NetlinkError

    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    try:
        with IPRoute() as routes:
            answers = routes.route("get", dst=str(destination), family=family)
    except NetlinkError:
        return None
    source = next((answer.get_attr("RTA_PREFSRC") for answer in answers), None)
    return ip_address(source) if source else None


def executable(path: str) -> ExeFile | None:
    """The file at `path` as the kernel knows it; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return ExeFile(found.st_dev, found.st_ino)


def user_id(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def netns_cookie() -> int:
    """The cookie of this process's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def boottime_ns() -> int:
    """The clock of `started_ns` in the kernel's records."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _unescape(field: str) -> str:
    """/proc/mounts writes blank, tab, newline and backslash as octal (fs/proc_namespace.c, mangle)."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


@dataclass(frozen=True, slots=True)
class ListenerOwner:
    """Who holds a listening socket: the cgroup it was made in, its user, and (if asked) who has it open."""

    cgroup: int
    uid: int
    pids: tuple[int, ...] = ()


def listener_owners(address: Address, port: int, with_pids: bool) -> list[ListenerOwner]:
    """Everybody who could be given a connection to address:port, by sock_diag(7) (INET_DIAG_CGROUP_ID, kernel 5.9).

    Several, when sockets share a port (SO_REUSEPORT) or one listens on the address and another on all addresses.
    """
    owners = owners_of(netlink.sockets(netlink.LISTEN), address, port)
    pids = _listening_pids(port) if with_pids and owners else ()
    return [replace(owner, pids=pids) for owner in owners]


def owners_of(listeners: Iterable[netlink.Socket], address: Address, port: int) -> list[ListenerOwner]:
    """Each owner once, among these listeners."""
    found = [each for each in listeners if each.port == port and _takes(each.address, address)]
    return list(dict.fromkeys(ListenerOwner(each.cgroup, each.uid) for each in found))


def _takes(bound: Address, address: Address) -> bool:
    # An IPv6 wildcard may be dual-stack; taking it for one can only make the answer stricter.
    return bound in (address, _ANY_V6) or (bound == _ANY_V4 and address.version == 4)


def _listening_pids(port: int) -> tuple[int, ...]:
    """By looking through every process's descriptors, which is slow: only for rules that ask for an executable."""
    import psutil

    connections = psutil.net_connections(kind="tcp")
    return tuple(
        sorted({c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr[1:] == (port,) and c.pid})
    )


def usage(pid: int) -> tuple[int, float] | None:
    """(resident bytes, CPU seconds so far) of a process; None when it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return process.memory_info().rss, times.user + times.system
    except psutil.Error:
        return None
