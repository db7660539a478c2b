"""One host of a world: a namespace, a cgroup subtree, a directory, and an Underpass agent once a mesh is deployed."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.world import cgroup, mesh, names, place
from tests.world.enter import Place
from tests.world.keeper import Keeper
from tests.world.mesh import Mesh
from tests.world.netns import End
from tests.world.place import DEVNULL, PYTHON, Stream
from tests.world.wait import until

AGENT, ADMIN = "agent", "admin"  # cgroups that are no applications: the agent's own, and its operator's
STOP_S = 15


class Host:
    def __init__(self, world: str, name: str, number: int) -> None:
        self.name = name
        self.end = End(names.netns(world, name), f"10.77.0.{number}", f"fd77::{number}")
        self.cgroup = names.cgroup(world) / name
        self.directory = names.run_dir(world) / name
        self.config_file = self.directory / "agent.yaml"
        self.log_file = self.directory / "agent.log"
        self.outcomes_file = self.directory / "log" / "outcomes.jsonl"
        self.keeper: Keeper | None = None

    @property
    def v4(self) -> str:
        return self.end.v4

    @property
    def v6(self) -> str:
        return self.end.v6

    def place(self, application: str, user: str | None = None, own_ipc: bool = False) -> Place:
        """Where `application` runs here; its cgroup is made when it is not there yet."""
        return Place(self.end.netns, str(cgroup.make(self.cgroup / application)), user, own_ipc)

    def spawn(
        self, application: str, command: Sequence[str], *, stdout: Stream = DEVNULL, stderr: Stream = DEVNULL
    ) -> subprocess.Popen[str]:
        return place.spawn(self.place(application), command, stdout=stdout, stderr=stderr)

    def run(
        self, application: str, command: Sequence[str], within_s: float = 60, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return place.run(self.place(application), command, stdin=stdin, within_s=within_s)

    def deploy(self, meshed: Mesh, tunnels: dict[str, str]) -> None:
        """Write everything the agent reads, except its certificates. Applications get their cgroups now."""
        self.directory.mkdir(parents=True, exist_ok=True)
        _give_to(mesh.AGENT_USER, self.outcomes_file.parent)
        for application in meshed.applications.get(self.name, ()):
            self.place(application)
        mesh.write(self.directory / "policy.d" / "policy.yaml", meshed.policy())
        mesh.write(self.directory / "services.yaml", meshed.directory(tunnels))
        config = meshed.config(self.name, self.directory, self.cgroup, cgroup.id_path(self.cgroup))
        mesh.write(self.config_file, config)

    def start(self) -> None:
        """Start the agent and keep it running, as its systemd unit would."""
        self.keeper = Keeper(f"agent {self.name}", self._start_agent)

    def stop(self) -> int:
        """Stop the agent for good, gracefully. Its exit status."""
        keeper, self.keeper = self.keeper, None
        return keeper.stop(STOP_S) if keeper else 0

    def kill_agent(self) -> list[int]:
        """SIGKILL to every process of the agent at once; the keeper starts it again. The pids that died."""
        path = self.cgroup / AGENT
        killed = cgroup.processes(path)
        cgroup.kill(path)
        return killed

    def let_go(self) -> None:
        """Nobody starts the agent again from here on."""
        if self.keeper:
            self.keeper.let_go()

    def cli(self, *arguments: str, within_s: float = 20) -> subprocess.CompletedProcess[str]:
        """`underpass COMMAND... -c FILE` as an operator on this host."""
        command = [PYTHON, "-m", "agent", *arguments, "-c", str(self.config_file)]
        return place.run(self.place(ADMIN), command, within_s=within_s)

    def status(self) -> dict[str, Any] | None:
        """None while nobody answers."""
        try:
            answer = json.loads(self.cli("status", "--json").stdout)
        except (ValueError, subprocess.TimeoutExpired):
            return None
        return answer if isinstance(answer, dict) else None

    def wait_ready(self, within_s: float = 30) -> dict[str, Any]:
        return until(self._ready_status, within_s, f"agent {self.name} ready (see {self.log_file})")

    def role_pids(self) -> dict[str, int]:
        """Process ids of the roles that run now, by role."""
        roles = (self.status() or {}).get("roles", {})
        return {name: role["pid"] for name, role in roles.items() if role.get("pid")}

    def outcomes(self) -> list[dict[str, Any]]:
        """Every record so far, oldest first. A last line without its end is still being written."""
        if not self.outcomes_file.exists():
            return []
        text = self.outcomes_file.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def log_tail(self, lines: int = 20) -> str:
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _ready_status(self) -> dict[str, Any] | None:
        status = self.status()
        return status if status and status.get("ready") else None

    def _start_agent(self) -> subprocess.Popen[str]:
        command = [PYTHON, "-m", "agent", "run", "-c", str(self.config_file)]
        with self.log_file.open("a") as log:
            return place.spawn(self.place(AGENT), command, stdout=log, stderr=log)


def _give_to(user: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    account = pwd.getpwnam(user)
    os.chown(directory, account.pw_uid, account.pw_gid)
