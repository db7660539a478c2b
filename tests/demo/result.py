"""What a run of the demo found, and its one JSON object for scripts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from tests.demo.claims import Claims

Exchanges = Mapping[str, Any]


@dataclass(slots=True)
class Result:
    """`added_ms` and `plaintext_bytes`: None until they are measured."""

    claims: Claims = field(default_factory=Claims)
    flows: list[dict[str, Any]] = field(default_factory=list)
    added_ms: Mapping[str, float] | None = None
    plaintext_bytes: int | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0

    @property
    def ok(self) -> bool:
        return self.claims.ok

    def finish(self) -> None:
        self.seconds = time.monotonic() - self.started

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "claims": [asdict(claim) for claim in self.claims.made],
            "flows": self.flows,
            "added_ms": dict(self.added_ms) if self.added_ms else {"p50": None, "p99": None},
            "plaintext_bytes_on_wire": self.plaintext_bytes,
            "seconds": round(self.seconds, 1),
        }


def added(rounds: Sequence[tuple[Exchanges, Exchanges]]) -> dict[str, float]:
    """What the same exchanges took longer through Underpass, in milliseconds: each round is (without, through), taken
    one right after the other, and the median round counts. Shared machines drift by more than what is measured."""
    return {
        rank: round(median(through[f"{rank}_ms"] - without[f"{rank}_ms"] for without, through in rounds), 3)
        for rank in ("p50", "p99")
    }
