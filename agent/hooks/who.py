"""Answers what only a privileged process may see: the path of a cgroup, the executable of a process.

The proxies that ask have no privileges and are not trusted more than that: a malformed question gets no answer.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Mapping
from ipaddress import ip_address

from agent import host
from agent.channel import Message

_FILEID_KERNFS = 0xFE  # include/linux/exportfs.h: the handle is the 64-bit id itself
_REMEMBERED = 65536
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_STARTTIME = 22 - 3  # field 22 of /proc/PID/stat; splitting starts behind the command, which is field 2

Exe = tuple[int, int, str]


class Who:
    """Paths are remembered for good, also those of cgroups that are gone: an id is never used again (fs/kernfs/dir.c,
    kernfs_new_node counts 64 bits up, since 5.5) and cgroup v2 cannot rename (kernel/cgroup/cgroup.c, only v1 has
    .rename)."""

    def __init__(self, mount: str) -> None:
        self._mount = mount
        self._mount_fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._paths: OrderedDict[int, str] = OrderedDict()

    def close(self) -> None:
        os.close(self._mount_fd)

    def learn(self, cgroups: Mapping[int, str]) -> None:
        self._paths.update(cgroups)
        while len(self._paths) > _REMEMBERED:
            self._paths.popitem(last=False)

    def answer(self, question: Message) -> Message | None:
        number, cgroup, pid, started = (question.get(name) for name in ("id", "cgroup", "pid", "started_ns"))
        if question.get("type") != "who" or not isinstance(number, int) or not isinstance(cgroup, int):
            return None
        if "listener" in question:
            return self._listener(number, question)
        exe = None
        if question.get("exe") and isinstance(pid, int) and isinstance(started, int):
            exe = executable_of(pid, started)
        return {"type": "whois", "id": number, "path": self.path(cgroup), "exe": exe}

    def _listener(self, number: int, question: Message) -> Message | None:
        """Who would get a connection to this address: [path or null, uid, exe or null] of each."""
        match question["listener"]:
            case [str(address), int(port)]:
                found = host.listener_owners(ip_address(address), port, bool(question.get("exe")))
            case _:
                return None
        owners = []
        for owner in found:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            exes = {executable_of(pid, now) for pid in owner.pids} or {None}
            owners += [[self.path(owner.cgroup), owner.uid, exe] for exe in exes]
        return {"type": "whois", "id": number, "owners": owners}

    def path(self, cgroup: int) -> str | None:
        """The path below the mount; None when there is no such cgroup."""
        known = self._paths.get(cgroup)
        if known is None:
            known = open_by_id(self._mount, self._mount_fd, cgroup)
            if known is None:
                self.learn(host.cgroups(self._mount))
                return self._paths.get(cgroup)
            self.learn({cgroup: known})
        return known


def open_by_id(mount: str, mount_fd: int, cgroup: int) -> str | None:
    """The path of a cgroup by its id, without walking the tree. Needs CAP_DAC_READ_SEARCH."""
    if not 0 < cgroup < 2**64:
        return None
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, cgroup))
    fd = ctypes.CDLL(None, use_errno=True).open_by_handle_at(mount_fd, handle, os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    if not path.startswith(mount) or path.endswith(" (deleted)"):
        return None
    return path.removeprefix(mount) or "/"


def executable_of(pid: int, connected_ns: int) -> Exe | None:
    """Device, inode and path of the program that process `pid` runs; None when it is gone or is not the one that
    connected at `connected_ns` (CLOCK_BOOTTIME).

    The open directory stands for one process: a later one with the same number cannot answer in its place. That it is
    not a later one already is seen by its start: a number is not given out again within the tick it is rounded to. A
    process that executes another program after its connect() is seen with the later one.
    """
    try:
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _started_ns(process) > connected_ns:
            return None
        found = os.stat("exe", dir_fd=process)
        return found.st_dev, found.st_ino, os.readlink("exe", dir_fd=process)
    except OSError:
        return None
    finally:
        os.close(process)


def _started_ns(process: int) -> int:
    """CLOCK_BOOTTIME, rounded down to a clock tick."""
    with open(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process), encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[_STARTTIME]) * _TICK_NS
