"""Appends outcome lines to one file. A line is written whole, or its loss is counted and said."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


class Writer:
    """`lost` counts lines that could not be written; the next line that can be says so itself (`lines_lost_before`)."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self.written = 0
        self.lost = 0
        self._lost_unsaid = 0

    def write(self, fields: Mapping[str, Any]) -> None:
        said = self._lost_unsaid
        line = json.dumps({**fields, "lines_lost_before": said} if said else fields, separators=(",", ":")) + "\n"
        data = line.encode()
        try:
            size = os.write(self._fd, data)
        except OSError:
            size = 0
        if size == len(data):
            self.written += 1
            self._lost_unsaid -= said
        else:
            if size:  # a disk that filled up in the middle: end the torn line, so that the next one stays readable
                self._end_line()
            self.lost += 1
            self._lost_unsaid += 1

    def _end_line(self) -> None:
        try:
            os.write(self._fd, b"\n")
        except OSError:
            return  # the torn line is counted as lost either way

    def close(self) -> None:
        os.close(self._fd)
