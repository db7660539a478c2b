"""What the demo says about Underpass, each with proof. One claim that does not hold does not stop the story."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO


class NotSoError(Exception):
    """A claim does not hold; the text says what was seen instead."""


# What a check meets when the thing it looks at is broken; anything else is a bug of the demo and ends the story.
BROKEN = (NotSoError, OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError)


@dataclass(frozen=True, slots=True)
class Claim:
    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class Claims:
    made: list[Claim] = field(default_factory=list)
    progress: TextIO = field(default_factory=lambda: sys.stderr)

    def check(self, name: str, show: Callable[[], str]) -> None:
        """`show` returns what proves the claim, or raises."""
        try:
            self.add(name, True, show())
        except BROKEN as problem:
            self.add(name, False, _one_line(problem))

    def add(self, name: str, ok: bool, detail: str) -> None:
        self.made.append(Claim(name, ok, detail))
        print(f"  {'ok ' if ok else 'NOT'} {name}: {detail}", file=self.progress, flush=True)

    @property
    def ok(self) -> bool:
        """Claims that were never made hold nothing."""
        return bool(self.made) and all(claim.ok for claim in self.made)


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise NotSoError(otherwise)


def _one_line(problem: BaseException) -> str:
    kind = "" if isinstance(problem, NotSoError) else f"{type(problem).__name__}: "
    return kind + " ".join(str(problem).split())
