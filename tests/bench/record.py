"""What was measured, and what could not be (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """One arm at one work in one round."""

    arm: str
    work: str
    connections: int
    round: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Failure:
    """`connections` 0: the arm as a whole."""

    arm: str
    work: str
    connections: int
    reason: str


@dataclass(slots=True)
class Record:
    measured: list[Measured] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def failed(self, arm: str, work: str, connections: int) -> bool:
        """What failed once is not tried again: it may have cost the patience of a whole time-out."""
        known = {(failure.arm, failure.work, failure.connections) for failure in self.failures}
        return (arm, work, connections) in known

    def values(self, arm: str, work: str, connections: int, figure: str) -> dict[int, float]:
        """By round."""
        return {
            one.round: one.figures[figure]
            for one in self.measured
            if (one.arm, one.work, one.connections) == (arm, work, connections) and figure in one.figures
        }

    def median(self, arm: str, work: str, connections: int, figure: str) -> float | None:
        found = self.values(arm, work, connections, figure)
        return median(found.values()) if found else None

    def results(self) -> list[dict[str, Any]]:
        """For each arm and work the medians, and under `spread` least and most; what failed says why."""
        keys = dict.fromkeys((one.arm, one.work, one.connections) for one in self.measured)
        rows = [self._result(*key) for key in keys]
        errors = [
            {"arm": one.arm, "work": one.work, "connections": one.connections, "error": one.reason}
            for one in self.failures
        ]
        return rows + errors

    def _result(self, arm: str, work: str, connections: int) -> dict[str, Any]:
        key = (arm, work, connections)
        found = [one.figures for one in self.measured if (one.arm, one.work, one.connections) == key]
        series = _series(found)
        return {
            "arm": arm,
            "work": work,
            "connections": connections,
            "rounds": len(found),
            **{name: tidy(median(values)) for name, values in series.items()},
            "spread": {name: spread(values) for name, values in series.items()},
        }


def medians(found: Sequence[Figures]) -> Figures:
    """Of each figure by itself."""
    return {name: median(values) for name, values in _series(found).items()}


def _series(found: Sequence[Figures]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for figures in found for name in figures)
    return {name: [figures[name] for figures in found if name in figures] for name in names}


def spread(values: Iterable[float]) -> list[float]:
    kept = list(values)
    return [tidy(min(kept)), tidy(max(kept))]


def tidy(value: float) -> float:
    """Five digits are more than any of these figures has in it."""
    return float(f"{value:.5g}")
