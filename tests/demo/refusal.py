"""Who may not, cannot: connect() itself fails, and a record says which rule it was."""

from __future__ import annotations

import json
from typing import Any

from tests.demo.claims import Claims, expect
from tests.demo.stage import DENY_RULE, POSTGRES_PORT
from tests.world import place
from tests.world.mesh import TRUST_DOMAIN
from tests.world.place import PYTHON
from tests.world.wait import until
from tests.world.world import World

AUDIT_S = 3


def show_refusals(world: World, claims: Claims) -> None:
    claims.check("an application that no rule allows gets EPERM from connect()", lambda: _refused(world, "intruder"))
    claims.check("its refusal is on record, with the rule", lambda: _recorded(world, "intruder", None))
    claims.check("an application that a rule denies gets EPERM from connect()", lambda: _refused(world, "batch"))
    claims.check("its refusal is on record, with that rule", lambda: _recorded(world, "batch", DENY_RULE))
    claims.check("a process without an identity gets nowhere", lambda: _nowhere(world))


def _refused(world: World, application: str) -> str:
    seen = _dial(world, application)
    expect(seen["result"] == "EPERM" and seen["step"] == "connect", f"{seen['step']} answered {seen['result']}")
    return f"{application}: connect() to {world.b.v4}:{POSTGRES_PORT} answered EPERM"


def _nowhere(world: World) -> str:
    seen = _dial(world, "stranger")  # a cgroup that no identity rule knows
    expect(seen["result"] not in ("ok", "ETIMEDOUT"), f"{seen['step']} answered {seen['result']}")
    return f"{seen['step']} answered {seen['result']}"


def _dial(world: World, application: str) -> dict[str, Any]:
    to = f"{world.b.v4}:{POSTGRES_PORT}"
    done = place.run(world.a.place(application), [PYTHON, "-m", "tests.apps.probe", "--connect", to, "--once"])
    return dict(json.loads(done.stdout))


def _recorded(world: World, application: str, rule: str | None) -> str:
    def find() -> dict[str, Any] | None:
        wanted = ("deny", f"spiffe://{TRUST_DOMAIN}/a/{application}", "core-db")
        return next((out for out in world.a.outcomes() if _what(out) == wanted), None)

    found = until(find, AUDIT_S, f"a record of the refusal of {application}")
    expect(bool(found["rule"]), f"the record names no rule: {found}")
    expect(rule in (None, found["rule"]), f"the record names the rule {found['rule']!r}, not {rule!r}")
    return "rule {rule}, reason {reason}, command {command}, pid {pid}".format_map(found)


def _what(outcome: dict[str, Any]) -> tuple[Any, Any, Any]:
    return outcome["event"], outcome["source"], outcome["service"]
