"""The bpf(2) system call, for what works on pinned objects and file descriptors: maps, pins, links, object info.

Everything but compiling goes through here, so that no long-lived process carries LLVM (about 120 MB with bcc).
Source: include/uapi/linux/bpf.h, union bpf_attr. Every function raises OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBERS = {"x86_64": 321, "aarch64": 280}
_SYSCALL = ctypes.CDLL(None, use_errno=True).syscall

_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 1, 2, 3, 4
_OBJ_PIN, _OBJ_GET, _OBJ_INFO, _PROG_QUERY = 6, 7, 15, 16
_LINK_CREATE, _LINK_UPDATE = 28, 29

ANY, NOEXIST, EXIST = 0, 1, 2  # update flags


def _call(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _SYSCALL(_NUMBERS[platform.machine()], command, ctypes.byref(buffer), len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def pin(fd: int, path: str) -> None:
    name = ctypes.create_string_buffer(path.encode())
    _call(_OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))


def get(path: str) -> int:
    """Open a pinned object; the descriptor is close-on-exec, as the kernel makes it."""
    name = ctypes.create_string_buffer(path.encode())
    return _call(_OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))


def create_link(program_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """Attach to a cgroup by a link: BPF_F_ALLOW_MULTI semantics, it never locks another tool out."""
    return _call(_LINK_CREATE, struct.pack("=IIII", program_fd, cgroup_fd, attach_type, 0))


def update_link(link_fd: int, program_fd: int) -> None:
    """Swap the program under a link; no connect() in between goes unseen."""
    _call(_LINK_UPDATE, struct.pack("=IIII", link_fd, program_fd, 0, 0))


@dataclass(frozen=True, slots=True)
class MapInfo:
    """The part of struct bpf_map_info that decides whether two maps have one layout."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """struct bpf_link_info of a cgroup link; `cgroup` is 0 when the cgroup is gone and the link protects nothing."""

    id: int
    program: int
    cgroup: int
    attach_type: int


def _info(fd: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    _call(_OBJ_INFO, struct.pack("=IIQ", fd, size, ctypes.addressof(buffer)))
    return buffer.raw


def map_info(fd: int) -> MapInfo:
    return MapInfo(*struct.unpack_from("=IIIIII", _info(fd, 80)))


def link_info(fd: int) -> LinkInfo:
    kind, link, program, _pad, cgroup, attach_type = struct.unpack_from("=IIIIQI", _info(fd, 64))
    del kind
    return LinkInfo(link, program, cgroup, attach_type)


def program_id(fd: int) -> int:
    return int(struct.unpack_from("=II", _info(fd, 232))[1])


def attached_programs(cgroup_fd: int, attach_type: int) -> list[int]:
    """Ids of the programs attached to this very cgroup (not inherited ones) at one hook."""
    ids = (ctypes.c_uint32 * 64)()
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", cgroup_fd, attach_type, 0, 0, ctypes.addressof(ids), 64), 64
    )
    if _SYSCALL(_NUMBERS[platform.machine()], _PROG_QUERY, ctypes.byref(attributes), 64) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    found = int(struct.unpack_from("=I", attributes.raw, 24)[0])
    return list(ids[:found])


class Map:
    """A map by its descriptor. Keys and values are bytes in the layout of bpf/flow.h."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = map_info(fd)
        self.key_size = info.key_size
        self.value_size = info.value_size
        self._value = ctypes.create_string_buffer(info.value_size * (_possible_cpus() if info.type in (5, 6) else 1))

    def lookup(self, key: bytes) -> bytes | None:
        """The value (for a per-CPU map: one after the other), None where there is none."""
        key_buffer = ctypes.create_string_buffer(key, self.key_size)
        try:
            _call(_MAP_LOOKUP, self._attributes(key_buffer, self._value, 0))
        except FileNotFoundError:
            return None
        return self._value.raw

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        key_buffer = ctypes.create_string_buffer(key, self.key_size)
        value_buffer = ctypes.create_string_buffer(value, self.value_size)
        _call(_MAP_UPDATE, self._attributes(key_buffer, value_buffer, flags))

    def delete(self, key: bytes) -> bool:
        """False when there was no such key."""
        key_buffer = ctypes.create_string_buffer(key, self.key_size)
        try:
            _call(_MAP_DELETE, self._attributes(key_buffer, None, 0))
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[bytes]:
        """All keys. The one just given may be deleted; entries that come and go meanwhile may be missed or repeated."""
        following = ctypes.create_string_buffer(self.key_size)
        key: ctypes.Array[ctypes.c_char] | None = None
        while True:
            try:
                _call(_MAP_NEXT_KEY, self._attributes(key, following, 0))
            except FileNotFoundError:
                return
            key = ctypes.create_string_buffer(following.raw, self.key_size)
            successor = following.raw
            yield successor

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _attributes(
        self, key: ctypes.Array[ctypes.c_char] | None, value: ctypes.Array[ctypes.c_char] | None, flags: int
    ) -> bytes:
        key_at = ctypes.addressof(key) if key is not None else 0
        value_at = ctypes.addressof(value) if value is not None else 0
        return struct.pack("=IIQQQ", self.fd, 0, key_at, value_at, flags)


def _possible_cpus() -> int:
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        return int(file.read().strip().rpartition("-")[2]) + 1
