"""Keeps the programs loaded, pinned and attached exactly once, whatever state the last keeper was killed in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from agent import bpfcall, host
from agent.hooks import attach, pins, source, state
from agent.hooks.compile import Compilation
from agent.hooks.problem import Problem
from agent.hooks.site import Site, place, settings

_ZERO = bytes(4)


class Keeper:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._pins = site.pins
        attach.wanted_attachments(site.root, site.own)  # a Problem now rather than after compiling
        self._digest = source.digest(site.pins.directory, site.max_flows)
        self._state = state.begin(site.state_dir, host.boot_id(), site.pins.directory)
        self._fds: dict[str, int] = {}

    def open(self) -> str | None:
        """Prepare the bpffs directory and look at what is there; a note when a bpffs had to be mounted."""
        mounted = pins.prepare(self._pins)
        if mounted is not None:
            self._record(replace(self._state, mounted=str(mounted)))
        attach.settle(self._pins)
        pins.check(self._pins, self._site.max_flows)
        return f"mounted a bpffs at {mounted}" if mounted else None

    def is_loaded(self) -> bool:
        """Whether the pinned programs and maps are the ones that this code would make."""
        return (
            self._state.digest == self._digest
            and self.has_maps()
            and attach.pinned_programs(self._pins.programs).keys() == source.PROGRAMS.keys()
        )

    def compile(self) -> Compilation:
        self._pin_maps_again()
        self.open()
        attach.clear(self._pins.staging)
        return Compilation(self._pins.directory, self._pins.staging, self._site.max_flows)

    def promote(self) -> None:
        """Take the compiled programs into use. A kill half-way leaves no digest, and the next start compiles again."""
        self._record(replace(self._state, digest=""))
        attach.promote(self._pins)
        self._record(replace(self._state, digest=self._digest))

    def open_maps(self) -> dict[str, bpfcall.Map]:
        """Open every map; from now on keep() pins one again that is unpinned."""
        self.close()
        for name in pins.layouts(self._site.max_flows):
            self._fds[name] = bpfcall.get(str(self._pins.map(name)))
        return {name: bpfcall.Map(fd) for name, fd in self._fds.items()}

    def write_settings(self, table: bpfcall.Map) -> bool:
        """Who is exempt and where captured connections go; whether it had to be written. Programs that find another
        schema here capture nothing."""
        new = settings(self._site, host.netns_cookie()).pack()
        if table.lookup(_ZERO) == new:
            return False
        table.update(_ZERO, new)
        return True

    def has_maps(self) -> bool:
        return pins.complete(self._pins, self._site.max_flows)

    def was_live(self) -> bool:
        """Whether a keeper before us has attached anything; it had filled the tables before."""
        return any(link.cgroup for link in attach.pinned_links(self._pins).values())

    def keep(self, maps: dict[str, bpfcall.Map]) -> list[str]:
        """Make actual what is wanted; what had to be done. Nothing, on a healthy host."""
        done = self._pin_maps_again()
        if self.write_settings(maps["settings"]):
            done.append("write settings")
        programs = attach.pinned_programs(self._pins.programs)
        if programs.keys() != source.PROGRAMS.keys():
            raise Problem(f"pinned programs are missing in {self._pins.programs}; they are compiled again")
        # Looked up each time: systemd removes a slice that falls empty and makes it again, with another id.
        root = place(self._site.mount, self._site.root.path)
        wanted = attach.wanted_attachments(root, self._site.own)
        done += attach.carry_out(attach.plan(wanted, attach.pinned_links(self._pins), programs), self._pins)
        links = {name: link.id for name, link in attach.pinned_links(self._pins).items()}
        if links != self._state.links:
            self._record(replace(self._state, links=links))
        _verify(wanted, programs)
        return done

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _pin_maps_again(self) -> list[str]:
        done = []
        for name, fd in self._fds.items():
            path = self._pins.map(name)
            if not path.exists():
                bpfcall.pin(fd, str(path))
                done.append(f"pin {name}")
        return done

    def _record(self, new: state.State) -> None:
        state.save(self._site.state_dir, new)
        self._state = new


def _verify(wanted: Iterable[attach.Wanted], programs: Mapping[str, int]) -> None:
    counts = attach.count_attached(wanted, programs)
    wrong = [f"{pin} {count} times" for pin, count in counts.items() if count != 1]
    if wrong:
        raise Problem(
            f"not attached exactly once: {', '.join(wrong)}; see `bpftool cgroup tree` for who else attaches them"
        )
