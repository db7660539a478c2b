"""What is measured when: first memory, each arm started afresh and alone; then all run, and take turns at each work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from subprocess import SubprocessError

from tests.bench import arms, certificates
from tests.bench.alone import alone
from tests.bench.arms import Arm, Underpass
from tests.bench.build import compile_programs, workshop
from tests.bench.hook import measure_hook
from tests.bench.idle import measure_idle
from tests.bench.load import LoadError
from tests.bench.measure import measure, run
from tests.bench.prove import ArmError
from tests.bench.record import Failure, Figures, Measured, Record, medians
from tests.bench.stage import FREE_LOCAL_PORT, LOCAL_PORT, NAME, Stage
from tests.bench.works import NONE, UNDERPASS, Kind, Plan, Work, rotated
from tests.world.world import World

# What an arm or a work meets when it is broken; anything else is a bug of the bench and ends it.
BROKEN = (ArmError, LoadError, OSError, SubprocessError, ValueError, LookupError)
WHOLE = "start"  # the work under which an arm fails that cannot start


def tell(plan: Plan, names: Sequence[str], record: Record) -> None:
    """Everything into `record`, which is of use also when this ends early."""
    with alone(), World(NAME) as world, workshop() as directory:
        say("compiling the load generator; two hosts: namespaces, cgroups, certificates")
        stage = Stage(world, compile_programs(directory))
        stage.prepare()
        tls = certificates.issue(world.directory / "peers", ("a", "b"))
        bench = _Bench(stage, plan, {name: arms.make(stage, name, tls) for name in names}, record)
        bench.measure_idle()
        bench.start_all()
        bench.measure_works()


class _Bench:
    def __init__(self, stage: Stage, plan: Plan, known: Mapping[str, Arm], record: Record) -> None:
        self._stage = stage
        self._plan = plan
        self._arms = known
        self._record = record

    def measure_idle(self) -> None:
        work = self._plan.idle
        for number in range(self._plan.idle_rounds):
            say(f"memory, round {number + 1} of {self._plan.idle_rounds}")
            for name in self._willing(work, number):
                if self._start(name):
                    arm = self._arms[name]
                    figures = self._try(name, work, partial(measure_idle, arm, self._plan))
                    if figures is not None:
                        self._note(Measured(name, work.name, work.connections, number, figures))
                    arm.stop()

    def start_all(self) -> None:
        if self._plan.works:
            say("all arms start")
            for name in self._arms:
                self._start(name)

    def measure_works(self) -> None:
        for number in range(self._plan.rounds):
            say(f"round {number + 1} of {self._plan.rounds}")
            for at, work in enumerate(self._plan.works):
                if work.kind is Kind.CONNECT:
                    self._measure_connect(work, number)
                else:
                    self._measure(work, number, number + at)

    def _measure(self, work: Work, number: int, first: int) -> None:
        found: dict[str, list[Figures]] = {}
        for turn in range(work.turns):
            for name in self._willing(work, first + turn):
                figures = self._try(name, work, self._step(name, work))
                if figures is not None:
                    found.setdefault(name, []).append(figures)
        for name, turns in found.items():
            if not self._record.failed(name, work.name, work.connections):
                self._note(Measured(name, work.name, work.connections, number, medians(turns)))

    def _step(self, name: str, work: Work) -> Callable[[], Figures]:
        arm = self._arms[name]
        if work.kind is not Kind.SAME_HOST:
            return lambda: measure(arm, work, self._plan)
        here = self._stage.world.a.v4
        free = name == NONE
        client = self._stage.free_client((here, FREE_LOCAL_PORT)) if free else self._stage.client((here, LOCAL_PORT))
        return lambda: run(client, work, self._plan, arm.pids)

    def _measure_connect(self, work: Work, number: int) -> None:
        ours = self._arms.get(UNDERPASS)
        if not isinstance(ours, Underpass) or UNDERPASS not in self._willing(work, 0):
            return
        try:
            found = measure_hook(self._stage, ours, self._plan)
        except BROKEN as problem:
            self._fail(UNDERPASS, work, problem)
            return
        for (arm, name), figures in found.items():
            self._note(Measured(arm, name, work.connections, number, figures))

    def _willing(self, work: Work, turn: int) -> list[str]:
        """Arms that have this work and have not failed at it."""
        record = self._record
        able = [
            name
            for name in work.arms
            if name in self._arms and not record.failed(name, WHOLE, 0)
            if not record.failed(name, work.name, work.connections)
        ]
        return rotated(able, turn)

    def _start(self, name: str) -> bool:
        if self._record.failed(name, WHOLE, 0):
            return False
        try:
            self._arms[name].start()
        except BROKEN as problem:
            self._record.failures.append(Failure(name, WHOLE, 0, one_line(problem)))
            say(f"  FAILED {name}: {one_line(problem)}")
            return False
        return True

    def _try(self, name: str, work: Work, step: Callable[[], Figures]) -> Figures | None:
        try:
            return step()
        except BROKEN as problem:
            self._fail(name, work, problem)
            return None

    def _note(self, one: Measured) -> None:
        self._record.measured.append(one)
        shown = "  ".join(f"{name} {value:.5g}" for name, value in one.figures.items())
        say(f"  {one.work:<18} {one.connections:>5}  {one.arm:<10} {shown}")

    def _fail(self, name: str, work: Work, problem: BaseException) -> None:
        reason = one_line(problem)
        self._record.failures.append(Failure(name, work.name, work.connections, reason))
        say(f"  FAILED {name} at {work.name} with {work.connections} connections: {reason}")


def one_line(problem: BaseException) -> str:
    kind = "" if isinstance(problem, ArmError | LoadError) else f"{type(problem).__name__}: "
    return kind + " ".join(str(problem).split())


def say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(f"bench: {text}", file=sys.stderr, flush=True)
