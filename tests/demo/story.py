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
from tests.demo.traffic import NEEDLES, run_terminal, show_applications, show_lab, show_terminal
from tests.world.world import World

EXCHANGES, ROUNDS = 300, 5


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

    _say("first without Underpass: what the wire shows")
    capture = world.capture("before")
    run_terminal(world, world.outside(world.a), EXCHANGES)
    show_judge(capture.finish(NEEDLES), claims)

    _say("both agents start")
    capture = world.capture()  # first, so that no tunnel is older than it
    world.start()

    _say("the applications work")
    show_applications(world, claims)
    claims.check("an ISO 8583 terminal signs on and authorises", lambda: show_terminal(world))
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

    _say("what it costs")  # last: half of it goes around Underpass on purpose, which the capture may not see
    claims.check("the cost of an exchange is measured", lambda: _measure(world, result))
    result.flows = flows(world.a.outcomes() + world.b.outcomes())


def _measure(world: World, result: Result) -> str:
    """The same program on the same network, once outside of every hook's reach and once as an application of host a."""
    places = world.outside(world.a), world.a.place("terminal")
    run_terminal(world, places[1], EXCHANGES)  # the first tunnel is made now, not in a round
    rounds = [
        (run_terminal(world, places[0], EXCHANGES), run_terminal(world, places[1], EXCHANGES)) for _ in range(ROUNDS)
    ]
    result.added_ms = added(rounds)
    without, through = (min(one["p50_ms"] for one in side) for side in zip(*rounds, strict=True))
    return f"{ROUNDS} rounds of {EXCHANGES} exchanges; best p50 {without:.3f} ms without, {through:.3f} ms through"


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
