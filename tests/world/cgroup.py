"""A subtree of cgroups that is ours: make, end everything in it, remove. Never the root cgroup."""

from __future__ import annotations

import time
from pathlib import Path

from tests.world import names


def make(path: Path) -> Path:
    """Make a cgroup and whatever is missing above it."""
    _check_ours(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def processes(path: Path) -> list[int]:
    """The processes of this cgroup and all below it."""
    files = [path / "cgroup.procs", *path.glob("**/cgroup.procs")]
    return sorted({int(pid) for file in files for pid in _read(file).split()})


def kill(path: Path) -> None:
    """SIGKILL to everything in the subtree at once; a process that forks meanwhile cannot slip through."""
    _check_ours(path)
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return  # no such cgroup, so nothing lives in it


def remove(path: Path, within_s: float = 10) -> None:
    """End everything in the subtree and remove it bottom-up. Fine if it is not there."""
    _check_ours(path)
    deadline = time.monotonic() + within_s
    while path.exists():
        kill(path)
        try:
            _remove_dirs(path)
        except OSError as error:
            # A killed process leaves its cgroup only when the kernel has finished with it: EBUSY until then.
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} cannot be removed ({error}); still in it: {processes(path)}") from error
            time.sleep(0.01)


def id_path(path: Path) -> str:
    """The cgroup as identity rules name it: below the mount, with a leading slash."""
    return f"/{path.relative_to(names.cgroup_mount())}"


def _remove_dirs(path: Path) -> None:
    for child in sorted((entry for entry in path.glob("**/") if entry != path), reverse=True):
        child.rmdir()
    path.rmdir()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (FileNotFoundError, OSError):
        return ""  # the cgroup went away between listing and reading (ENODEV or ENOENT)


def _check_ours(path: Path) -> None:
    top = path.relative_to(names.cgroup_mount()).parts[:1]
    if not top or not top[0].startswith(names.PREFIX) or ".." in path.parts:
        raise ValueError(f"{path} is not a cgroup of a world; worlds keep below {names.PREFIX}*")
