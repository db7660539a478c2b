"""Two hosts on one kernel, `a` (10.77.0.1, fd77::1) and `b` (10.77.0.2, fd77::2), joined by a veth pair.

    with World("mytest") as world:
        world.deploy(MESH)                      # certificates and configuration, see mesh.py
        world.start()                           # both agents, until ready
        world.a.run("ledger", ["psql", ...])    # a command as an application of a host

A name belongs to one world at a time: entering sweeps away whatever an earlier one of that name left, and leaving
removes everything. `cleanup(name)` does the same from outside. Only root can.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from tests.world import cgroup, names, netns
from tests.world.capture import Capture
from tests.world.cleanup import HOSTS, cleanup
from tests.world.enter import Place
from tests.world.host import Host
from tests.world.mesh import TRUST_DOMAIN, TUNNEL_PORT, Mesh
from tests.world.place import PYTHON, REPO

OUTSIDE = "outside"  # beside the hosts' subtrees: in reach of no agent's hooks
COMMAND_S = 30


class World:
    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = names.run_dir(name)
        self.a, self.b = (Host(name, host, number) for number, host in enumerate(HOSTS, start=1))

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def host(self, name: str) -> Host:
        return {host.name: host for host in self.hosts}[name]

    def __enter__(self) -> World:
        cleanup(self.name)
        try:
            self._create()
        except BaseException:
            cleanup(self.name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts:
            host.let_go()
        cleanup(self.name)

    def outside(self, host: Host) -> Place:
        """On that host's network, but not below its cgroup subtree: what an ungoverned process is."""
        return Place(host.end.netns, str(cgroup.make(names.cgroup(self.name) / OUTSIDE)))

    def deploy(self, mesh: Mesh) -> None:
        tunnels = {host.name: f"{host.v4}:{TUNNEL_PORT}" for host in self.hosts}
        for host in self.hosts:
            host.deploy(mesh, tunnels)
        if not self.root_ca.exists():
            self._issue()

    @property
    def root_ca(self) -> Path:
        return self.directory / "ca"

    def start(self, within_s: float = 30) -> None:
        """Start both agents; returns when both are ready."""
        for host in self.hosts:
            host.start()
        for host in self.hosts:
            host.wait_ready(within_s)

    def capture(self, name: str = "wire") -> Capture:
        """Record everything that crosses the veth pair from now on, as host a sees it."""
        return Capture(self.outside(self.a), self.directory / f"{name}.pcap", self.b.v4)

    def _create(self) -> None:
        self.directory.mkdir(mode=0o755)
        for host in self.hosts:
            host.directory.mkdir(mode=0o755)
            cgroup.make(host.cgroup)
        netns.create((self.a.end, self.b.end))

    def _issue(self) -> None:
        self._underpass("ca", "init", str(self.root_ca), "--trust-domain", TRUST_DOMAIN)
        for host in self.hosts:
            out = str(host.directory / "ca")
            self._underpass("ca", "host", host.name, "--root", str(self.root_ca), "--out", out)

    def _underpass(self, *arguments: str) -> None:
        command = [PYTHON, "-m", "agent", *arguments]
        try:
            subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, timeout=COMMAND_S)
        except subprocess.CalledProcessError as error:
            raise OSError(f"underpass {' '.join(arguments)}: {error.stderr.strip()}") from error
