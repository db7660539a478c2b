"""The load generator and the echo server, compiled from the C files beside this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOAD_SOURCES = ("load.c", "common.c", "exchange.c", "churn.c", "bulk.c", "hold.c")
ECHO_SOURCES = ("echo.c", "common.c")
COMPILE_S = 60
PREFIX = "underpass-bench-"


@dataclass(frozen=True, slots=True)
class Programs:
    load: Path
    echo: Path


@contextmanager
def workshop() -> Iterator[Path]:
    """A directory for the programs, and the end of those that a killed bench left: two benches never run at once."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if left.lstat().st_uid == os.geteuid() and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as directory:
        yield Path(directory)


def compile_programs(directory: Path) -> Programs:
    """`directory` must allow programs to run: /run is often mounted noexec."""
    programs = Programs(directory / "load", directory / "echo")
    _compile(programs.load, LOAD_SOURCES)
    _compile(programs.echo, ECHO_SOURCES)
    return programs


def _compile(program: Path, sources: tuple[str, ...]) -> None:
    command = ["cc", "-O2", "-Wall", "-Wextra", "-o", str(program), *[str(HERE / source) for source in sources]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    if done.returncode:
        raise OSError(f"cc failed: {done.stderr.strip()}")
