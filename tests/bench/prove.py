"""Does an arm carry a request? Asked after its start, until it does or its time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.load import Client, LoadError

READY_S = 20
PAUSE_S = 0.05
LAST_LINES = 3


class ArmError(Exception):
    """The arm cannot start; the text says why."""


def prove(client: Client, alive: Callable[[], bool], said: Callable[[], str], within_s: float = READY_S) -> None:
    """`alive` false: nothing to wait for. `said`: the arm's own last words, for the error."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            client.run("rr", connections=1, seconds=0.01, warmup=0)
            return
        except LoadError as problem:
            if not alive() or time.monotonic() > deadline:
                raise ArmError(f"{problem}; its log ends: {said()}") from problem
        time.sleep(PAUSE_S)


def tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return " / ".join(text.splitlines()[-LAST_LINES:]) or "(nothing)"
