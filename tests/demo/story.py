"""The demo from beginning to end: what happens, in which order, and what is claimed on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.demo import stage
from tests.demo.claims import BROKEN, Claims
from tests.demo.flows import flows
from tests.demo.killing import show_killing
from tests.demo.proof import show_judge, show_records, show_wire
from tests.demo.refusal import show_refusals
from tests.demo.result import Result, added
from tests.demo.stage import MESH, NAME
from tests.demo.traffic import NEEDLES, check_terminal, run_terminal, show_applications, show_lab
from tests.world.world import World


def tell(result: Result, then: Callable[[Result], None]) -> None:
    """Runs the whole story into `result`; `then` is called at its end, with everything still running."""
    with World(NAME) as world:
        with _ending(result, world):
            _tell(world, result)
        result.finish()
        then(result)


def _tell(world: World, result: Result) -> None:
    claims = result.claims
    _say("two hosts: namespaces, cgroups, certificates, configuration; PostgreSQL and the switch on b")
    world.deploy(MESH)
    stage.start_servers(world)

    _say("first without Underpass: what the exchanges cost, and what the wire shows")
    capture = world.capture("before")
    baseline = run_terminal(world, world.outside(world.a))
    show_judge(capture.finish(NEEDLES), claims)

    _say("both agents start")
    world.start()
    capture = world.capture()

    _say("the applications work")
    show_applications(world, claims)
    _show_terminal(world, result, baseline)
    show_lab(world, claims)
    show_records(world, claims)

    _say("who may not, cannot")
    show_refusals(world, claims)

    _say("the agent of host a is killed")
    show_killing(world, claims)

    _say("what crossed the wire")
    report = capture.finish(NEEDLES)
    result.plaintext_bytes = report.plaintext_bytes
    show_wire(report, claims)
    result.flows = flows(world.a.outcomes() + world.b.outcomes())


def _show_terminal(world: World, result: Result, baseline: dict[str, float]) -> None:
    def show() -> str:
        through = run_terminal(world, world.a.place("terminal"))
        result.added_ms = added(through, baseline)
        return check_terminal(through, world.a.v4)

    result.claims.check("an ISO 8583 terminal signs on and authorises", show)


@contextmanager
def _ending(result: Result, world: World) -> Iterator[None]:
    """Where the story cannot go on, that is a claim that does not hold; so is a demo that has a bug."""
    try:
        yield
    except BROKEN as problem:
        result.claims.add("the story comes to its end", False, f"{type(problem).__name__}: {problem}")
    if not result.ok:
        for host in world.hosts:
            _say(f"the last the agent of {host.name} said:\n{host.log_tail()}")


def _say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


def unfinished(why: str) -> Result:
    """For a story that could not even say how it went."""
    result = Result(Claims())
    result.claims.add("the story comes to its end", False, why)
    return result
