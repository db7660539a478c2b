"""Appends outcome lines to one file. A line is written whole, or its loss is counted and said."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


class Writer:
    """Made while still root, so that of the roles without privileges only this process can write. `lost` counts lines
    that could not be written; the next line that can be says so itself (`lines_lost_before`)."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        self._torn = False
        self.written = 0
        self.lost = 0
        self._lost_unsaid = 0

    def write(self, fields: Mapping[str, Any]) -> None:
        said = self._lost_unsaid
        line = json.dumps({**fields, "lines_lost_before": said} if said else fields, separators=(",", ":")) + "\n"
        # A torn line is ended before the next begins: that one must stay readable.
        data = b"\n" * self._torn + line.encode()
        try:
            size = os.write(self._fd, data)
        except OSError:
            size = 0
        if size == len(data):
            self.written += 1
            self._lost_unsaid -= said
            self._torn = False
        else:
            self._torn = size > self._torn if size else self._torn  # a disk that filled up in the middle
            self.lost += 1
            self._lost_unsaid += 1

    def close(self) -> None:
        os.close(self._fd)
