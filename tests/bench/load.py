"""Run the load generator at a place, and hear what it says (see load.c)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.world import place
from tests.world.enter import Place

END_S = 5
Said = dict[str, Any]


class LoadError(Exception):
    """The load generator did not get through; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Client:
    """Where a client runs and what it dials."""

    program: Path
    place: Place
    to: tuple[str, int]

    def run(self, mode: str, on_started: Callable[[], None] = lambda: None, **options: float) -> Said:
        """`on_started` is called when what is measured begins."""
        with Running(self, mode, options) as running:
            on_started()
            return running.finish()


class Running:
    """A load generator that has started to measure; for `idle`, one that holds its connections."""

    def __init__(self, client: Client, mode: str, options: dict[str, float]) -> None:
        given = [f"{key}={value:g}" for key, value in options.items()]
        command = [str(client.program), mode, f"to={client.to[0]}:{client.to[1]}", *given]
        pipe = place.PIPE
        self._process = place.spawn(client.place, command, stdin=pipe, stdout=pipe, stderr=pipe)

    def __enter__(self) -> Running:
        try:
            self._hear("started")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def finish(self) -> Said:
        assert self._process.stdin is not None
        self._process.stdin.close()
        said = self._hear("done")
        if said["errors"]:
            raise LoadError(f"{said['errors']} connections failed beside {said['requests']} that did not")
        return said

    def _hear(self, event: str) -> Said:
        """It ends by itself when nothing goes on (its own limits), so this does not wait for ever."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said = dict(json.loads(line)) if line else {}
        if said.get("event") != event:
            raise LoadError(str(said.get("text") or self._last_words()))
        return said

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        code = self._process.wait(END_S)
        return f"the load generator ended with {code} {self._process.stderr.read().strip()}".rstrip()

    def _end(self) -> None:
        process = self._process
        if process.poll() is None:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()
