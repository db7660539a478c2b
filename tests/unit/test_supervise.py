"""The supervisor with real, small processes as roles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent import channel, runstate
from agent.supervise import Supervisor

ROLE = """
import json, signal, socket, sys, time
status = socket.socket(fileno=int(sys.argv[1]))
status.setblocking(True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for kind in sys.argv[2].split(","):
    if kind == "die":
        sys.exit(3)
    status.send(json.dumps({"type": kind, "text": "it is dark"}).encode())
while True:
    time.sleep(0.05)
"""


class Stage:
    def __init__(self, run_dir: Path) -> None:
        self.behaviour: dict[str, str] = {}
        self.started: list[str] = []
        self.readies = 0
        self.supervisor = Supervisor(str(run_dir), self.spawn, self.ready)
        self.ends = {name: channel.pair(1 << 16) for name in ("hooks", "control", "proxy-0")}

    def add(self, name: str, behaviour: str = "ready") -> None:
        self.behaviour[name] = behaviour
        status, ours = self.ends[name]
        self.supervisor.add(name, {"status": status.fileno()}, ours)

    def spawn(self, name: str, needs: Mapping[str, int]) -> subprocess.Popen[bytes]:
        self.started.append(name)
        fd = needs["status"]
        return subprocess.Popen([sys.executable, "-c", ROLE, str(fd), self.behaviour[name]], pass_fds=(fd,))

    def ready(self) -> None:
        self.readies += 1

    def run_until(self, condition: object, limit: float = 15.0) -> None:
        deadline = time.monotonic() + limit
        assert callable(condition)
        assert self.supervisor.run(until=lambda: bool(condition()) or time.monotonic() > deadline)
        assert condition(), "waited in vain"


@pytest.fixture
def stage(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Stage(tmp_path)
    yield made
    made.supervisor.stop(0)


def test_it_is_ready_once_every_role_is(stage: Stage, tmp_path: Path) -> None:
    for name in ("hooks", "control", "proxy-0"):
        stage.add(name)
    stage.run_until(lambda: stage.readies)
    state = runstate.read(str(tmp_path))
    assert state["ready"]
    assert set(state["roles"]) == {"hooks", "control", "proxy-0"}


def test_a_killed_role_is_started_again_and_readiness_told_again(stage: Stage, tmp_path: Path) -> None:
    stage.add("control")
    stage.run_until(lambda: stage.readies == 1)
    os.kill(runstate.read(str(tmp_path))["roles"]["control"]["pid"], signal.SIGKILL)
    stage.run_until(lambda: stage.readies == 2)
    assert stage.started == ["control", "control"]
    assert runstate.read(str(tmp_path))["roles"]["control"]["restarts"] == 1


def test_a_role_that_dies_at_once_is_started_ever_more_rarely(stage: Stage) -> None:
    stage.add("hooks", "die")
    begun = time.monotonic()
    stage.run_until(lambda: len(stage.started) == 4)
    assert time.monotonic() - begun > 0.2 + 0.4 + 0.8
    assert not stage.readies


def test_a_roles_problem_is_shown_until_it_is_ready_again(stage: Stage, tmp_path: Path) -> None:
    stage.add("hooks", "problem")
    stage.run_until(lambda: runstate.read(str(tmp_path))["roles"].get("hooks", {}).get("problem") == "it is dark")
    assert not runstate.read(str(tmp_path))["ready"]


def test_words_of_a_dead_role_do_not_count_for_its_successor(stage: Stage, tmp_path: Path) -> None:
    stage.add("hooks", "maps,ready")
    stage.run_until(lambda: stage.supervisor.told("hooks", "maps"))
    stage.behaviour["hooks"] = "beat"
    os.kill(runstate.read(str(tmp_path))["roles"]["hooks"]["pid"], signal.SIGKILL)
    stage.run_until(lambda: len(stage.started) == 2 and stage.supervisor.told("hooks", "beat"))
    assert not stage.supervisor.told("hooks", "maps")
    assert not runstate.read(str(tmp_path))["ready"]


def test_stop_ends_every_role(stage: Stage, tmp_path: Path) -> None:
    for name in ("hooks", "proxy-0"):
        stage.add(name)
    stage.run_until(lambda: stage.readies)
    pids = [role["pid"] for role in runstate.read(str(tmp_path))["roles"].values()]
    stage.supervisor.stop(1.0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
