"""The ways between client and server that are compared. Each can start, stop, and say which processes are its own."""

from __future__ import annotations

from typing import Protocol

from tests.bench.load import Client
from tests.bench.peer import Peer
from tests.bench.peers.hop import Tls
from tests.bench.prove import ArmError, prove, tail
from tests.bench.stage import ECHO_PORT, FREE_ECHO_PORT, MESH, Stage
from tests.bench.works import NONE, UNDERPASS
from tests.world import cgroup
from tests.world.host import AGENT


class Arm(Protocol):
    name: str

    def start(self) -> None:
        """Returns when a request has gone through; ArmError when none does."""

    def stop(self) -> None:
        """Fine when it does not run."""

    def client(self) -> Client: ...

    def pids(self) -> list[int]:
        """Every process between client and server, on both hosts."""


class NoProxy:
    """Straight over the veth pair."""

    name = NONE

    def __init__(self, stage: Stage) -> None:
        self._client = stage.free_client((stage.world.b.v4, FREE_ECHO_PORT))

    def start(self) -> None:
        prove(self._client, lambda: True, lambda: "")

    def stop(self) -> None:
        pass

    def client(self) -> Client:
        return self._client

    def pids(self) -> list[int]:
        return []


class Underpass:
    """Agents on both hosts; the client dials the server's own address."""

    name = UNDERPASS

    def __init__(self, stage: Stage) -> None:
        self._world = stage.world
        self._client = stage.client((stage.world.b.v4, ECHO_PORT))

    def start(self) -> None:
        try:
            self._world.deploy(MESH)
            self._world.start()
            prove(self._client, lambda: True, self._said)
        except (OSError, TimeoutError) as problem:
            self.stop()
            raise ArmError(f"{problem}; its log ends: {self._said()}") from problem
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for host in self._world.hosts:
            host.stop()

    def client(self) -> Client:
        return self._client

    def pids(self) -> list[int]:
        return [pid for host in self._world.hosts for pid in cgroup.processes(host.cgroup / AGENT)]

    def proxy_pids(self) -> list[int]:
        """The workers on host a."""
        return [pid for role, pid in self._world.a.role_pids().items() if role.startswith("proxy")]

    def _said(self) -> str:
        return " | ".join(tail(host.log_file) for host in self._world.hosts)


def make(stage: Stage, name: str, tls: dict[str, Tls]) -> Arm:
    if name == NONE:
        return NoProxy(stage)
    return Underpass(stage) if name == UNDERPASS else Peer(stage, name, tls)
