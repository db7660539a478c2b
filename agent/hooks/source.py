"""The compile unit from bpf/, and which program goes to which hook."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

FILES = ("connect.c", "sockops.c", "getpeername.c", "getsockname.c")

_INCLUDE = re.compile(r'#include "(.+)"')


@dataclass(frozen=True, slots=True)
class Hook:
    """Numbers of enum bpf_prog_type and enum bpf_attach_type, include/uapi/linux/bpf.h."""

    program_type: int
    attach_type: int


_CGROUP_SOCK_ADDR, _SOCK_OPS = 18, 13

# In the order of attaching: whoever is captured must already be published, and answered for.
PROGRAMS = {
    "sockops": Hook(_SOCK_OPS, 3),
    "getpeername4": Hook(_CGROUP_SOCK_ADDR, 29),
    "getpeername6": Hook(_CGROUP_SOCK_ADDR, 30),
    "getsockname4": Hook(_CGROUP_SOCK_ADDR, 31),
    "getsockname6": Hook(_CGROUP_SOCK_ADDR, 32),
    "connect4": Hook(_CGROUP_SOCK_ADDR, 10),
    "connect6": Hook(_CGROUP_SOCK_ADDR, 11),
}


def bpf_directory() -> Path:
    return Path(str(resources.files("bpf")))


def include_tree() -> Path:
    """What bcc is given in place of kernel headers."""
    return bpf_directory() / "include"


def unit(read: Callable[[str], str] | None = None) -> str:
    """All programs as one text. bcc rewrites `map.method()` only in the main file, so our own headers are pasted in,
    each once; #line keeps the compiler's messages pointing at the real files."""
    seen: set[str] = set()
    return "\n".join(line for name in FILES for line in _expand(name, read or _read, seen)) + "\n"


def flags(pins: Path, max_flows: int) -> list[str]:
    return ["-Wall", f'-DPINS="{pins}"', f"-DMAX_FLOWS={max_flows}"]


def digest(pins: Path, max_flows: int) -> str:
    """Tells whether programs found pinned are the ones this code would compile."""
    text = "\n".join([unit(), *flags(pins, max_flows), *map(repr, PROGRAMS.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(name: str) -> str:
    return (bpf_directory() / name).read_text(encoding="utf-8")


def _expand(name: str, read: Callable[[str], str], seen: set[str]) -> Iterator[str]:
    if name in seen:
        return
    seen.add(name)
    yield f'#line 1 "{name}"'
    for number, line in enumerate(read(name).splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            yield line
        else:
            yield from _expand(include[1], read, seen)
            yield f'#line {number + 1} "{name}"'
