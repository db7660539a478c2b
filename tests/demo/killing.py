"""The agent of host a is killed, whole and in parts, while an application keeps dialling."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from tests.demo.claims import Claims, expect
from tests.demo.stage import POSTGRES_PORT
from tests.world import place
from tests.world.host import Host
from tests.world.place import PYTHON
from tests.world.wait import until
from tests.world.world import World

RECOVERY_S = 30
STEADY = 5  # so many good answers in a row are "works"
# The kernel ends the killed one by one: a dial that begins at the same moment may still end well.
GRACE_S = 0.05


class Prober:
    """The application `ledger`, dialling its database twenty times a second."""

    def __init__(self, world: World) -> None:
        self._file = world.directory / "probe.jsonl"
        command = [PYTHON, "-m", "tests.apps.probe", "--connect", f"{world.b.v4}:{POSTGRES_PORT}"]
        with self._file.open("w") as out:
            self._process = place.spawn(world.a.place("ledger"), command, stdin=place.PIPE, stdout=out)

    def __enter__(self) -> Prober:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def since(self, moment: float) -> list[dict[str, Any]]:
        """Every attempt that began after it."""
        text = self._file.read_text()
        attempts = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [attempt for attempt in attempts if attempt["at"] >= moment]

    def wait_steady(self, since: float) -> float:
        """When the first of `STEADY` good answers in a row began."""

        def steady() -> float | None:
            last = self.since(since)[-STEADY:]
            return float(last[0]["at"]) if len(last) == STEADY and all(_good(one) for one in last) else None

        return until(steady, RECOVERY_S, f"{STEADY} good answers in a row (agent killed at {since:.1f} s)")


def show_killing(world: World, claims: Claims) -> None:
    with Prober(world) as prober:
        name = "agent a killed with SIGKILL: new connects fail until it is back, and it is back by itself"
        claims.check(name, lambda: _kill_all(world.a, prober))
        for role in ("hooks", "control", "proxy-0"):
            name = f"only {role} killed: it is restarted and traffic goes on"
            claims.check(name, partial(_kill_role, world.a, prober, role))


def _kill_all(host: Host, prober: Prober) -> str:
    keeper = host.keeper
    assert keeper is not None
    prober.wait_steady(time.monotonic() - 1)
    killed_at = time.monotonic()
    died = host.kill_agent()
    until(lambda: keeper.started_at > killed_at, RECOVERY_S, "the restart of the agent")
    back_at = prober.wait_steady(keeper.started_at)
    host.wait_ready(RECOVERY_S)
    attempts = prober.since(killed_at)
    dead = [attempt for attempt in attempts if killed_at + GRACE_S < attempt["at"] < keeper.started_at]
    wrong = [attempt for attempt in dead if _good(attempt)]
    expect(bool(dead), "nobody dialled while it was dead")
    expect(not wrong, f"{len(wrong)} of {len(dead)} connects got through while no agent lived")
    what = f"{len(died)} processes killed; of {len(attempts)} connects {_show(_failures(attempts))}"
    return f"{what}; worked again after {back_at - killed_at:.1f} s"


def _kill_role(host: Host, prober: Prober, role: str) -> str:
    before = until(lambda: host.role_pids().get(role), RECOVERY_S, f"the pid of {role}")
    prober.wait_steady(time.monotonic() - 1)
    killed_at = time.monotonic()
    os.kill(before, signal.SIGKILL)
    until(lambda: _restarted(host, role, before), RECOVERY_S, f"another {role}, ready")
    restarted_s = time.monotonic() - killed_at
    prober.wait_steady(time.monotonic())
    attempts = prober.since(killed_at)
    failed = _failures(attempts)
    # Without its proxy a captured connection has nowhere to go; without the other two it must not notice.
    expect(role.startswith("proxy") or not failed, f"traffic noticed: {_show(failed)}")
    return f"restarted and ready after {restarted_s:.1f} s; of {len(attempts)} connects {_show(failed)}"


def _restarted(host: Host, role: str, before: int) -> bool:
    status = host.status() or {}
    now = status.get("roles", {}).get(role, {})
    return bool(status.get("ready") and now.get("ready") and now.get("pid") not in (None, before))


def _good(attempt: dict[str, Any]) -> bool:
    return bool(attempt["result"] == "ok")


def _failures(attempts: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(attempt["result"] for attempt in attempts if not _good(attempt))


def _show(failed: Counter[str]) -> str:
    return ", ".join(f"{count} failed with {name}" for name, count in failed.items()) or "none failed"
