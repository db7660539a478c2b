"""CPU time and memory of processes, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
QUIET = 0.03  # of one core
QUIET_S = 0.1
SETTLE_S = 10.0


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all their threads, ended ones too. A process that has ended counts nothing."""
    return sum(parse_cpu(_read(pid, "stat")) for pid in pids)


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory with every shared page divided among those who share it."""
    return sum(parse_pss(_read(pid, "smaps_rollup")) for pid in pids)


def parse_cpu(stat: str) -> float:
    """Fields 14 and 15, counted behind the command: that may hold blanks and brackets."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0


def parse_pss(rollup: str) -> int:
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def settle(pids: Callable[[], Iterable[int]], within_s: float = SETTLE_S) -> None:
    """Until they do next to nothing: what one measurement left to do must not fall into the next one."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        before = cpu_seconds(pids())
        time.sleep(QUIET_S)
        if cpu_seconds(pids()) - before <= QUIET * QUIET_S + 1 / _TICKS:
            return


def _read(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / name).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
