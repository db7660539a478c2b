"""Being told to stop, once; and parents that die."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """Not an Exception: nobody on the way may take it for a problem of their own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def raise_when_told() -> None:
    for number in STOP:
        signal.signal(number, _stop)


def ignore() -> None:
    """From here on only cleaning up is left, and nothing may interrupt that."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def forward_to(pid: int) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(pid, number)  # never another's pid: its parent has not waited for it yet

    for number in STOP:
        signal.signal(number, forward)


def die_with(parent: int) -> bool:
    """Ask for SIGTERM when the parent ends, however it ends. False: it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    return os.getppid() == parent


def _stop(number: int, frame: FrameType | None) -> None:
    ignore()
    raise Stopped(number)
