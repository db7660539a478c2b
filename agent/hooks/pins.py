"""The bpffs directory: what is pinned where, and whether what is found there may be adopted.

    DIRECTORY/flows ...          the maps of bpf/maps.h
    DIRECTORY/programs/NAME      the programs that the links run
    DIRECTORY/programs-new/NAME  freshly compiled, not yet promoted
    DIRECTORY/links/NAME         the attachments; NAME@agent is the one at the agent's own cgroup

bpffs refuses names with a dot (kernel/bpf/inode.c, bpf_lookup).
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from agent import bpfcall, records
from agent.hooks.problem import Problem

_BPFFS_MAGIC = 0xCAFE4A11
_USUAL_MOUNT = Path("/sys/fs/bpf")  # a directory of sysfs: nothing can be made in it before bpffs is mounted
_PLAIN = re.compile(r"/[A-Za-z0-9_./@+:-]+")  # it becomes a C string
_ZERO = bytes(4)

HASH, ARRAY, PERCPU_ARRAY, LPM_TRIE, SK_STORAGE, RINGBUF = 1, 2, 6, 11, 24, 27  # enum bpf_map_type
_NO_PREALLOC = 1
_REFUSALS_BYTES = 256 * 1024
_CLOSES_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """What two maps must share for one to be read as the other."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def layouts(max_flows: int) -> dict[str, Layout]:
    """bpf/maps.h as numbers; tests/host/test_layout.py compares it with the maps that bcc makes."""
    return {
        # First, because it has the schema: of all that may differ this says best what has happened.
        "settings": Layout(ARRAY, 4, records.SETTINGS.size, 1, 0),
        "flows": Layout(HASH, records.TUPLE.size, records.FLOW.size, max_flows, 0),
        "socket_flows": Layout(SK_STORAGE, 4, records.FLOW.size, 0, _NO_PREALLOC),
        "services": Layout(LPM_TRIE, records.SERVICE_KEY.size, records.SERVICE.size, 32768, _NO_PREALLOC),
        "callers": Layout(HASH, records.CALLER_KEY.size, 4, 16384, _NO_PREALLOC),
        "verdicts": Layout(HASH, records.VERDICT_KEY.size, records.VERDICT.size, 65536, _NO_PREALLOC),
        "leases": Layout(ARRAY, 4, records.LEASE.size, 1, 0),
        "exits": Layout(PERCPU_ARRAY, 4, 8, len(records.Exit), 0),
        "refusals": Layout(RINGBUF, 0, 0, _REFUSALS_BYTES, 0),
        "closes": Layout(RINGBUF, 0, 0, _CLOSES_BYTES, 0),
    }


@dataclass(frozen=True, slots=True)
class Pins:
    """Paths only."""

    directory: Path

    @property
    def programs(self) -> Path:
        return self.directory / "programs"

    @property
    def staging(self) -> Path:
        return self.directory / "programs-new"

    @property
    def links(self) -> Path:
        return self.directory / "links"

    def map(self, name: str) -> Path:
        return self.directory / name


def prepare(pins: Pins) -> Path | None:
    """Make the directory, mode 0700, on a bpffs; the mount point when one had to be mounted for that."""
    directory = pins.directory
    if not _PLAIN.fullmatch(str(directory)):
        raise Problem(f"bpffs: {str(directory)!r} has characters a pin cannot have; use letters, digits and / _ . -")
    mounted = None
    try:
        if directory.is_relative_to(_USUAL_MOUNT) and _USUAL_MOUNT.is_dir() and not is_bpffs(_USUAL_MOUNT):
            mounted = _mount(_USUAL_MOUNT)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_bpffs(directory):
            mounted = _mount(directory)
        for path in (directory, pins.programs, pins.links):
            path.mkdir(mode=0o700, exist_ok=True)
            path.chmod(0o700)
    except OSError as error:
        raise Problem(
            f"bpffs: cannot use {directory}: {error.strerror}; mount a bpffs (mount -t bpf bpf {_USUAL_MOUNT})"
        ) from error
    return mounted


def is_bpffs(path: Path) -> bool:
    buffer = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes and begins with f_type, a long
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == _BPFFS_MAGIC


def check(pins: Pins, max_flows: int) -> None:
    """Refuse maps that mean something else than ours: they hold live state, and adopting them would reinterpret it."""
    for name, wanted in layouts(max_flows).items():
        try:
            fd = bpfcall.get(str(pins.map(name)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Problem(f"cannot open {pins.map(name)}: {error.strerror}; run `underpass hooks remove`") from error
        try:
            _compare(pins.map(name), wanted, layout(bpfcall.map_info(fd)))
            if name == "settings":
                _check_schema(pins.map(name), bpfcall.Map(fd).lookup(_ZERO))
        finally:
            os.close(fd)


def layout(info: bpfcall.MapInfo) -> Layout:
    return Layout(info.type, info.key_size, info.value_size, info.max_entries, info.flags)


def complete(pins: Pins, max_flows: int) -> bool:
    return all(pins.map(name).exists() for name in layouts(max_flows))


def _compare(path: Path, wanted: Layout, found: Layout) -> None:
    if wanted == found:
        return
    names = [name for name in Layout.__dataclass_fields__ if getattr(wanted, name) != getattr(found, name)]
    what = ", ".join(f"{name} is {getattr(found, name)} and should be {getattr(wanted, name)}" for name in names)
    hint = " (capture.max_flows has changed)" if path.name == "flows" and names == ["max_entries"] else ""
    raise Problem(
        f"{path} has another layout: {what}{hint}; its programs go on protecting; to replace them stop the agent,"
        " run `underpass hooks remove` and start it again"
    )


def _check_schema(path: Path, settings: bytes | None) -> None:
    schema = records.SETTINGS.unpack(settings)[5] if settings else 0
    if schema not in (0, records.SCHEMA_VERSION):
        raise Problem(
            f"{path} is of schema {schema} and this agent writes {records.SCHEMA_VERSION}; its programs go on"
            " protecting; to replace them stop the agent, run `underpass hooks remove` and start it again"
        )


def _mount(point: Path) -> Path:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(point), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(point))
    return point


def unmount(point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(point), 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(point))
