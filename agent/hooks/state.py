"""What this agent attached and mounted, in one small file: removal is by this record, never by resemblance.

It holds for one boot; after a reboot nothing of it is left in the kernel. The file has a directory of its own, because
the rest of the state directory belongs to roles without privileges.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from agent.hooks.problem import Problem

_ROOM = "hooks"
_FILE = "attached.json"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class State:
    """`digest` is of the source that `programs/` was compiled from; `links` maps pin names to link ids."""

    boot: str
    directory: str
    mounted: str | None = None
    digest: str = ""
    links: dict[str, int] = field(default_factory=dict)


def load(state_dir: Path, boot: str) -> State | None:
    """None when there is no record of this boot. An unreadable record is a Problem: guessing could detach others."""
    path = state_dir / _ROOM / _FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        state = State(raw["boot"], raw["directory"], raw["mounted"], raw["digest"], dict(raw["links"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} is damaged ({error}); look at `bpftool cgroup tree` and delete the file") from error
    return state if state.boot == boot else None


def save(state_dir: Path, state: State) -> None:
    room = _room(state_dir)
    new = room / f"{_FILE}.new"
    new.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    os.replace(new, room / _FILE)


def forget(state_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (state_dir / _ROOM / _FILE).unlink()


def begin(state_dir: Path, boot: str, directory: Path) -> State:
    """The record to go on with; Problem when this boot's hooks live in another directory."""
    found = load(state_dir, boot)
    if found is None:
        return State(boot, str(directory))
    if found.directory != str(directory) and (Path(found.directory) / "links").is_dir():
        raise Problem(
            f"bpffs: the hooks are pinned in {found.directory} and the configuration now says {directory}; set it back,"
            " or run `underpass hooks remove` with the old one first"
        )
    return found if found.directory == str(directory) else State(boot, str(directory))


@contextlib.contextmanager
def lock(state_dir: Path) -> Iterator[None]:
    """One keeper at a time: two would compile and repair against each other."""
    with open(_room(state_dir) / _LOCK, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another hooks process holds {file.name}; stop the agent first") from None
        yield


def _room(state_dir: Path) -> Path:
    room = state_dir / _ROOM
    room.mkdir(mode=0o700, parents=True, exist_ok=True)
    return room
