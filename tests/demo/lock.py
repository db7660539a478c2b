"""One demo at a time on this machine. Whoever holds the lock owns every name of the world `demo`."""

from __future__ import annotations

import fcntl
import os
import time

from tests.demo.stage import NAME
from tests.world import names

FILE = names.RUN / f"{names.PREFIX}{NAME}.lock"
PATIENCE_S = 1  # `held` takes it shared for a moment


def take() -> int | None:
    """A descriptor that holds the lock as long as it, or a child's copy of it, is open. None: another demo has it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = os.open(FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_the_file(descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.05)
        os.close(descriptor)


def release(descriptor: int) -> None:
    """Removed while still held: whoever opened it meanwhile sees that it is not the file any more, and tries again."""
    FILE.unlink(missing_ok=True)
    os.close(descriptor)


def held() -> bool:
    """Whether a demo is running."""
    try:
        descriptor = os.open(FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_the_file(descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_ino == FILE.stat().st_ino
    except FileNotFoundError:
        return False
