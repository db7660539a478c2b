"""The two hosts of the bench: what the agents are told, the echo servers, and the limits that must not be measured."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.build import Programs
from tests.bench.load import Client
from tests.world import cgroup, names, place
from tests.world.enter import Place
from tests.world.host import Host
from tests.world.mesh import Mesh
from tests.world.world import World

NAME = "bench"
CLIENT, SERVER = "client", "server"  # the governed applications
ECHO_PORT, LOCAL_PORT = 7000, 7001  # of the governed servers: on host b, and on host a for the same-host work
FREE_ECHO_PORT, FREE_LOCAL_PORT, DEAF_PORT = 7100, 7101, 7102  # in reach of no agent's hooks
HOP_PORT = 7200  # of the peers' first hops; each takes two
CORES = os.cpu_count() or 1

APPLICATIONS = {"a": (CLIENT, SERVER), "b": (SERVER,)}
SERVICES = {
    "echo": {"application": SERVER, "ports": [ECHO_PORT], "endpoints": [{"host": "b", "address": "10.77.0.2"}]},
    "local": {"application": SERVER, "ports": [LOCAL_PORT], "endpoints": [{"host": "a", "address": "10.77.0.1"}]},
}
RULES = [{"name": "client-uses-both", "allow": {"from": ["a/client"], "to": ["echo", "local"]}}]
MESH = Mesh(APPLICATIONS, SERVICES, RULES, settings={"workers": CORES})

# Closed connections keep their ports for a minute: 28,000 would be gone after two seconds of new connections. The
# range begins above every port that somebody listens on here.
_PORTS = "echo 16000 65535 >/proc/sys/net/ipv4/ip_local_port_range && echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse"


@dataclass(frozen=True, slots=True)
class Stage:
    world: World
    programs: Programs

    def prepare(self) -> None:
        a, b = self.world.hosts
        for host in (a, b):
            place.run(self.world.outside(host), ["sh", "-c", _PORTS], check=True)
        self.serve(b.place(SERVER), (b.v4, ECHO_PORT))
        self.serve(a.place(SERVER), (a.v4, LOCAL_PORT))
        self.serve(self.world.outside(b), (b.v4, FREE_ECHO_PORT))
        self.serve(self.world.outside(a), (a.v4, FREE_LOCAL_PORT))

    def free_client(self, to: tuple[str, int]) -> Client:
        """A client on host a that no agent knows of."""
        return Client(self.programs.load, self.world.outside(self.world.a), to)

    def client(self, to: tuple[str, int]) -> Client:
        """A client on host a that is the application `client`."""
        return Client(self.programs.load, self.world.a.place(CLIENT), to)

    def serve(self, where: Place, at: tuple[str, int], *options: str) -> subprocess.Popen[str]:
        """Returns when it listens. It dies with us."""
        command = [str(self.programs.echo), f"{at[0]}:{at[1]}", *options]
        server = place.spawn(where, command, stdout=place.PIPE)
        assert server.stdout is not None
        said = json.loads(server.stdout.readline() or "{}")
        if said.get("event") != "listening":
            raise OSError(f"the echo server cannot listen on port {at[1]}: {said.get('text', 'it ended')}")
        return server

    @contextmanager
    def deaf(self) -> Iterator[tuple[str, int]]:
        """A new listener that never accepts: a connect() to it costs what the kernel's part costs, and nobody wakes."""
        at = ("127.0.0.1", DEAF_PORT)
        server = self.serve(self.world.outside(self.world.a), at, "deaf")
        try:
            yield at
        finally:
            server.kill()
            server.communicate()

    def hop_place(self, arm: str, host: Host) -> Place:
        """A cgroup for one process of a peer and its children, out of reach of the agents' hooks."""
        return Place(host.end.netns, str(cgroup.make(self.hop_cgroup(arm, host))))

    def hop_cgroup(self, arm: str, host: Host) -> Path:
        return names.cgroup(self.world.name) / "peers" / f"{arm}-{host.name}"
