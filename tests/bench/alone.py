"""One bench at a time on this machine: two would measure each other, and the world has one name."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.stage import NAME


class BusyError(Exception):
    """Another bench runs."""


@contextmanager
def alone() -> Iterator[None]:
    """Holds a name that the kernel frees with the process, whatever ends it: nothing to sweep up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        try:
            lock.bind(f"\0underpass-{NAME}")
        except OSError as taken:
            raise BusyError("another bench is running on this machine; wait for its end") from taken
        yield
