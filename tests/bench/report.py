"""The run as one JSON object, and as RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import table
from tests.bench.ratios import Ratio
from tests.bench.record import Record

FILE = Path(__file__).with_name("RESULTS.md")
NOTES = "## Notes"  # from here on the file is written by people, and kept
_TOP = """# Benchmark results

Written by `{command}` on {date}.

- Machine: {machine}
- Versions: {versions}
- {rounds}. Each figure is the median over the rounds; arms take turns at each work, another one first each time.
- A peer is two processes, one on each host: plaintext, TLS 1.3 with P-256 certificates on both sides, plaintext; full
  handshakes only. Client, server and all proxies share the cores above.
- CPU counts user and system time of every process between client and server, both hosts together.
- Ratios are worked out in each round; the best peer is the one with the best median.

"""


@dataclass(frozen=True, slots=True)
class Facts:
    """About the run as a whole."""

    command: str
    date: str
    machine: str
    versions: Mapping[str, str]
    rounds: str


def as_json(record: Record, ratios: Mapping[str, Ratio | None]) -> dict[str, Any]:
    """Null where a side was not measured; `failures` says why."""
    return {
        "results": record.results(),
        "ratios": {name: ratio.value if ratio else None for name, ratio in ratios.items()},
        "spread": {name: [ratio.low, ratio.high] if ratio else None for name, ratio in ratios.items()},
        "failures": [{"arm": one.arm, "work": one.work, "reason": one.reason} for one in record.failures],
    }


def as_markdown(record: Record, ratios: Mapping[str, Ratio | None], facts: Facts, old: str) -> str:
    """`old`: the file as it was, for its notes."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    top = _TOP.format(
        command=facts.command, date=facts.date, machine=facts.machine, versions=versions, rounds=facts.rounds
    )
    _, found, notes = old.partition(f"\n{NOTES}\n")
    return f"{top}{table.show(record, ratios)}\n\n{NOTES}\n{notes if found else ''}"


def write(record: Record, ratios: Mapping[str, Ratio | None], facts: Facts) -> None:
    old = FILE.read_text() if FILE.exists() else ""
    FILE.write_text(as_markdown(record, ratios, facts, old))
