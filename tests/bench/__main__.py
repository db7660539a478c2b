"""`python -m tests.bench`: measure, then print a table, or one JSON object. Progress goes to standard error."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from tests.bench import limits, machine, report, table, works
from tests.bench.added import with_added
from tests.bench.alone import BusyError
from tests.bench.ratios import ratios
from tests.bench.record import Record
from tests.bench.report import Facts
from tests.bench.story import say, tell
from tests.bench.works import ARMS, FULL, QUICK, Plan
from tests.demo import signals
from tests.demo.signals import Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        plan = works.narrowed(QUICK if given.quick else FULL, _names(given.work), given.rounds)
        arms = _arms(_names(given.only))
    except ValueError as problem:
        return _fail(str(problem))
    if os.geteuid() != 0:
        return _fail("needs root (namespaces, cgroups and BPF); start it as root")
    facts = _facts(plan, arguments)
    record = Record()
    limits.raise_descriptors()
    try:
        code = _run(works.fitted(plan, limits.most_connections()), arms, record)
    except BusyError as problem:
        return _fail(str(problem))
    record = with_added(record)
    found = ratios(record)
    print(json.dumps(report.as_json(record, found)) if given.json else table.show(record, found), flush=True)
    if given.write:
        report.write(record, found, facts)
    return code or (1 if record.failures else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./run bench", description="Underpass beside other proxies, in one run.")
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer works, shorter and fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of a table")
    parser.add_argument("--write", action="store_true", help="also write tests/bench/RESULTS.md")
    parser.add_argument("--only", default="", metavar="ARM,...", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--work", default="", metavar="NAME,...", help="for instance rr-200,cps,idle")
    parser.add_argument("--rounds", type=int, choices=range(1, 51), metavar="N")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _arms(names: Sequence[str]) -> list[str]:
    if unknown := set(names) - set(ARMS):
        raise ValueError(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    return [arm for arm in ARMS if not names or arm in names]


def _run(plan: Plan, arms: Sequence[str], record: Record) -> int:
    """What was measured before an interruption is still shown."""
    signals.raise_when_told()
    try:
        tell(plan, arms, record)
    except Stopped as stopped:
        say(str(stopped))
        return 128 + stopped.number
    return 0


def _facts(plan: Plan, arguments: Sequence[str] | None) -> Facts:
    command = " ".join(["./run bench", *(sys.argv[1:] if arguments is None else arguments)])
    rounds = f"{plan.rounds} rounds of {plan.seconds:g} s for each arm and work, {plan.idle_rounds} for memory"
    date = datetime.now(UTC).date().isoformat()
    return Facts(command, date, machine.machine(), machine.versions(), rounds)


def _fail(text: str) -> int:
    print(f"bench: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
