"""Remove everything of a world by its name alone, whoever made it and however far it came."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.world import cgroup, names, netns

HOSTS = ("a", "b")


def cleanup(world: str) -> None:
    """Safe to repeat, and safe while nothing is there. Everything is tried; the first problem is raised at the end."""
    steps: list[Callable[[], None]] = [
        partial(cgroup.remove, names.cgroup(world)),  # first: processes would hold on to all the rest
        partial(_unmount_below, names.run_dir(world)),
        *[partial(netns.remove, names.netns(world, host)) for host in HOSTS],
        partial(_remove_tree, names.run_dir(world)),
    ]
    problems = []
    for step in steps:
        try:
            step()
        except OSError as problem:
            problems.append(problem)
    if problems:
        raise problems[0]


def leftovers(world: str) -> list[str]:
    """What is there of a world: empty after `cleanup`."""
    spaces = [netns.path(names.netns(world, host)) for host in HOSTS]
    mounted = [target for _, target, _ in names.mounts() if target.is_relative_to(names.run_dir(world))]
    paths = [names.cgroup(world), names.run_dir(world), *spaces]
    return [str(path) for path in [*paths, *mounted] if path.exists()]


def _unmount_below(directory: Path, within_s: float = 5) -> None:
    """bpffs with the agent's pins. A pin keeps its program attached: a mount that stays would be a hook that stays."""
    deadline = time.monotonic() + within_s
    while below := [target for _, target, _ in names.mounts() if target.is_relative_to(directory)]:
        done = subprocess.run(["umount", str(below[-1])], capture_output=True, text=True, check=False)
        if done.returncode and time.monotonic() > deadline:
            raise OSError(f"umount {below[-1]}: {done.stderr.strip()}")
        time.sleep(0 if done.returncode == 0 else 0.05)


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
