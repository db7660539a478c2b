"""Two hops of another proxy: plaintext in on host a, mutual TLS to host b, plaintext out."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.bench.certificates import peer_name
from tests.bench.limits import most_connections
from tests.bench.load import Client
from tests.bench.peers import envoy, haproxy, nginx, stunnel
from tests.bench.peers.hop import Hop, Start, Tls
from tests.bench.prove import prove, tail
from tests.bench.stage import CORES, FREE_ECHO_PORT, HOP_PORT, Stage
from tests.bench.works import PEERS
from tests.world import cgroup, place
from tests.world.host import Host

_STARTS = {"haproxy": haproxy.start, "nginx": nginx.start, "stunnel": stunnel.start, "envoy": envoy.start}


class Peer:
    def __init__(self, stage: Stage, name: str, tls: dict[str, Tls]) -> None:
        a, b = stage.world.hosts
        port = HOP_PORT + 2 * PEERS.index(name)
        first, second, echo = ("127.0.0.1", port), (b.v4, port + 1), (b.v4, FREE_ECHO_PORT)
        most = most_connections()
        self.name = name
        self._stage = stage
        self._client = stage.free_client(first)
        self._hops = {
            b: Hop(False, second, echo, tls["b"], peer_name("a"), b.directory / name, CORES, most),
            a: Hop(True, first, second, tls["a"], peer_name("b"), a.directory / name, CORES, most),
        }
        self._running: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        try:
            for host, hop in self._hops.items():
                self._running.append(self._spawn(host, hop.directory, _STARTS[self.name](hop)))
            prove(self._client, self._alive, self._said)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for host in self._hops:
            cgroup.remove(self._stage.hop_cgroup(self.name, host))
        for process in self._running:
            process.wait()
        self._running.clear()

    def client(self) -> Client:
        return self._client

    def pids(self) -> list[int]:
        return [pid for host in self._hops for pid in cgroup.processes(self._stage.hop_cgroup(self.name, host))]

    def _spawn(self, host: Host, directory: Path, start: Start) -> subprocess.Popen[str]:
        directory.mkdir(exist_ok=True)
        (directory / start.file).write_text(start.text)
        with (directory / "log").open("w") as log:
            return place.spawn(self._stage.hop_place(self.name, host), start.command, stdout=log, stderr=log)

    def _alive(self) -> bool:
        return all(process.poll() is None for process in self._running)

    def _said(self) -> str:
        return " | ".join(tail(hop.directory / "log") for hop in self._hops.values())
