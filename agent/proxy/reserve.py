"""One descriptor kept back for the moment when there is no other left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class Reserve:
    def __init__(self) -> None:
        self._fd: int | None = None
        self._take()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, one descriptor is free that was not before."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        try:
            yield
        finally:
            self._take()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # the machine has none left either: then there is no reserve for a while
            self._fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
