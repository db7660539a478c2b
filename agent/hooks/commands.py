"""What `underpass hooks status` and `underpass hooks remove` do. Status only reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent import bpfcall, host, records
from agent.config import Config
from agent.hooks import attach, pins, source, state
from agent.hooks.problem import Problem
from agent.hooks.site import find_site, place
from agent.hooks.who import Who

_ZERO = bytes(4)
_DETACH_S = 2.0
_KERNEL_FILES = {"maps.debug", "progs.debug"}  # the kernel puts them into every new bpffs


def hooks_status(config: Config) -> dict[str, Any]:
    """Wanted and actual, side by side."""
    site = find_site(config)
    found = state.load(site.state_dir, host.boot_id())
    maps = dict(_open_maps(site.pins, site.max_flows))
    try:
        own = _agent_place(site.mount, maps.get("settings"))
        return {
            "directory": str(site.pins.directory),
            "compiled_from_this_version": found is not None
            and found.digest == source.digest(site.pins.directory, site.max_flows),
            "cgroup_root": site.root.path,
            "agent_cgroup": own.path if own else None,
            "programs": _programs(site.pins, site.root, own),
            "maps": {name: _map_status(table) for name, table in maps.items()},
            "exits": _exits(maps.get("exits")),
        }
    finally:
        for table in maps.values():
            os.close(table.fd)


def hooks_remove(config: Config) -> list[str]:
    """Detach and delete exactly what is ours; one line for each thing removed. Needs no cgroup to be there still."""
    where, state_dir = pins.Pins(Path(config.bpffs)), Path(config.state_dir)
    with _no_agent(Path(config.run_dir)), state.lock(state_dir):
        found = state.load(state_dir, host.boot_id())
        lines = []
        if where.directory.is_dir() and pins.is_bpffs(where.directory):
            lines += _remove_pins(where)
        if found is not None:
            lines += _unmount(found)
        state.forget(state_dir)
    return lines or [f"nothing is pinned in {where.directory}"]


@contextlib.contextmanager
def _no_agent(run_dir: Path) -> Iterator[None]:
    """A running agent would go on with maps that nothing writes any more. It holds this lock (agent/app.py)."""
    try:
        file = open(run_dir / "lock", encoding="ascii")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem("the agent is running and would lose its maps; stop it first") from None
        yield


def _remove_pins(where: pins.Pins) -> list[str]:
    links = attach.pinned_links(where)
    lines = []
    for name in attach.ours():  # capture first: a captured connection needs the others to the end
        if name in links:
            (where.links / name).unlink()
            lines.append(f"detached {name}")
    _wait_until_detached(links)
    for directory in (where.programs, where.staging):
        attach.clear(directory)
    for name in pins.layouts(1):
        if where.map(name).exists():
            where.map(name).unlink()
            lines.append(f"deleted map {name}")
    lines += [f"left {path}: it is not ours" for path in _strangers(where)]
    for directory in (where.links, where.directory):
        if directory.is_dir() and not any(directory.iterdir()) and not os.path.ismount(directory):
            directory.rmdir()
    return lines


def _strangers(where: pins.Pins) -> list[Path]:
    known = {where.programs, where.staging, where.links}
    inside = [path for directory in known if directory.is_dir() for path in directory.iterdir()]
    outside = [path for path in where.directory.iterdir() if path not in known and path.name not in _KERNEL_FILES]
    return sorted(inside + outside)


def _unmount(found: state.State) -> list[str]:
    """Only what we mounted, and only when nobody else has put anything there."""
    if found.mounted is None:
        return []
    point = Path(found.mounted)
    others = [path.name for path in point.iterdir() if path.name not in _KERNEL_FILES]
    if others:
        return [f"left the bpffs at {point} mounted: {', '.join(others)} is in it"]
    if not os.path.ismount(point):
        return []
    pins.unmount(point)
    return [f"unmounted the bpffs at {point}"]


def _wait_until_detached(links: dict[str, bpfcall.LinkInfo]) -> None:
    """The kernel detaches in the background once the last reference to a link is gone."""
    mount = host.cgroup_mount()
    if mount is None:
        return
    paths = host.cgroups(mount)
    alive = [link for link in links.values() if link.cgroup in paths]
    deadline = time.monotonic() + _DETACH_S
    while any(_runs(mount + paths[link.cgroup].rstrip("/"), link) for link in alive):
        if time.monotonic() > deadline:
            raise Problem("links are unpinned and still attached: another process holds them; see `bpftool link list`")
        time.sleep(0.01)


def _runs(directory: str, link: bpfcall.LinkInfo) -> bool:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # the cgroup is gone, and with it the attachment
    try:
        return link.program in bpfcall.attached_programs(fd, link.attach_type)
    finally:
        os.close(fd)


def _programs(where: pins.Pins, root: attach.Place, own: attach.Place | None) -> list[dict[str, Any]]:
    try:
        wanted = attach.wanted_attachments(root, own or root)
    except Problem:  # the agent's cgroup is not known: nothing of it is attached
        wanted = tuple(attach.Wanted(name, name, root) for name in source.PROGRAMS)
    links, programs = attach.pinned_links(where), attach.pinned_programs(where.programs)
    running = {each.pin: links[each.pin].program for each in wanted if each.pin in links}
    counts = attach.count_attached(wanted, running)
    return [
        {
            "name": each.pin,
            "wanted": 1,
            "attached": counts[each.pin],
            "link": links[each.pin].id if each.pin in links else None,
            "program": running.get(each.pin),
            "current": each.pin in running and running[each.pin] == programs.get(each.program),
            "cgroup": each.place.path,
            "alive": each.pin in links and links[each.pin].cgroup == each.place.id,
        }
        for each in wanted
    ]


def _open_maps(where: pins.Pins, max_flows: int) -> Iterator[tuple[str, bpfcall.Map]]:
    for name in pins.layouts(max_flows):
        try:
            fd = bpfcall.get(str(where.map(name)))
        except OSError:
            continue
        yield name, bpfcall.Map(fd)


def _agent_place(mount: str, settings: bpfcall.Map | None) -> attach.Place | None:
    """The cgroup that the programs exempt; None when nothing is written yet or that cgroup is gone."""
    value = settings.lookup(_ZERO) if settings else None
    number = records.SETTINGS.unpack(value)[1] if value and len(value) == records.SETTINGS.size else 0
    who = Who(mount)
    try:
        path = who.path(number) if number else None
        return place(mount, path) if path else None
    except Problem:
        return None
    finally:
        who.close()


def _map_status(table: bpfcall.Map) -> dict[str, Any]:
    info = bpfcall.map_info(table.fd)
    listed = info.type in (pins.HASH, pins.LPM_TRIE)
    return {"id": info.id, "entries": len(list(table.keys())) if listed else None, "max_entries": info.max_entries}


def _exits(table: bpfcall.Map | None) -> dict[str, int]:
    """Counters by name, summed over the CPUs."""
    return {exit_.name.lower(): _sum(table.lookup(struct.pack("=I", exit_))) for exit_ in records.Exit} if table else {}


def _sum(values: bytes | None) -> int:
    return sum(struct.unpack(f"={len(values) // 8}Q", values)) if values else 0
