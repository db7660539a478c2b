"""Two real proxy workers in threads, joined by real TLS over loopback. Only the kernel map is a stand-in: it says that
every captured connection was meant for the address the test chose."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from unittest import mock

import pytest

from agent import channel
from agent.certs.authority import make_intermediate, make_leaf, make_root
from agent.config import Config, load_config
from agent.proxy.engine import make as engine_make
from agent.proxy.worker import Inherited, Worker
from agent.records import Flow, Role, pack_flow
from agent.snapshot import LeafText, Snapshot, encode
from policy.identity import SpiffeId
from policy.model import Directory, Endpoint, MeshHost, PortRange, Service

DOMAIN = "test.bank"
WAIT_S = 20.0
WAYS = ("compiled", "python")


class StandInMap:
    """lookup() answers a flow to `original`; update() is remembered."""

    def __init__(self) -> None:
        self.original: tuple[str, int] | None = None
        self.noted: list[bytes] = []

    def lookup(self, key: bytes) -> bytes | None:
        if self.original is None:
            return None
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        address = ip_address(self.original[0])
        source = ip_address("127.0.0.1")
        return pack_flow(Flow(1, 7, now, address, source, 1000, 4242, 0, 0, self.original[1], 40000, Role.ACCEPTED))

    def update(self, key: bytes, value: bytes) -> None:
        self.noted.append(value)


@dataclass
class Proxy:
    """One worker and everything around it that the supervisor, control and hooks would be."""

    config: Config
    capture: socket.socket
    tunnel: socket.socket
    flows: StandInMap = field(default_factory=StandInMap)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    cgroup: str = "/test/ledger"
    silent: bool = False  # answers nothing about who is who
    owner: str = "/test/core"  # of whatever listens where the proxy is about to dial

    def __post_init__(self) -> None:
        self._ends = {name: channel.pair(1 << 20) for name in ("status", "orders", "who", "outcomes")}
        given = Inherited(
            status=self._ends["status"][0],
            orders=self._ends["orders"][0],
            who=self._ends["who"][0],
            outcomes=self._ends["outcomes"][0],
            captures=(self.capture,),
            tunnels=self.tunnel,
            socket_flows=self.flows,
        )
        self.worker = Worker(self.config, self.config.identities, dict, given)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self.worker.run), threading.Thread(target=self._answer)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()

    def start(self, snapshot: Snapshot) -> None:
        self.run()
        self.give(snapshot)
        wait_until(lambda: self.told("ready"))

    def give(self, snapshot: Snapshot) -> None:
        channel.send(self._ends["orders"][1], {"type": "snapshot"}, encode(snapshot))

    def told(self, what: str) -> bool:
        while (message := channel.receive(self._ends["status"][1])) is not None:
            if message[0]["type"] == what:
                return True
        return False

    def ended(self, event: str = "close") -> list[dict[str, Any]]:
        return [outcome for outcome in list(self.outcomes) if outcome["event"] == event]

    def close(self) -> None:
        self.worker._loop.stopped = True
        channel.send(self._ends["status"][1], {"type": "wake"})  # it would sleep for up to a second
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(WAIT_S)
        for pair in self._ends.values():
            for end in pair:
                end.close()

    def _answer(self) -> None:
        while not self._stop.wait(0.002):
            while (question := channel.receive(self._ends["who"][1])) is not None:
                if self.silent:
                    continue
                owners = [[self.owner, 1000, None]]
                answer = {"type": "whois", "id": question[0]["id"], "path": self.cgroup, "owners": owners}
                channel.send(self._ends["who"][1], answer)
            while (told := channel.receive(self._ends["outcomes"][1])) is not None:
                self.outcomes.append(told[0]["outcome"])


class Pair:
    """Hosts a and b; the application listens on b at `app_address`."""

    def __init__(self, limits: str = "") -> None:
        self.app = socket.create_server(("127.0.0.1", 0))
        self.app.settimeout(WAIT_S)
        self.port = self.app.getsockname()[1]
        captures = [_listening() for _ in "ab"]
        tunnels = [_listening() for _ in "ab"]
        self.tunnel_ports = [tunnel.getsockname()[1] for tunnel in tunnels]
        self.root = make_root(DOMAIN, time.time())
        self.a, self.b = (
            Proxy(_config(host, limits), capture, tunnel)
            for host, capture, tunnel in zip("ab", captures, tunnels, strict=True)
        )
        self.a.flows.original = ("127.9.9.9", self.port)
        self._generation = 0

    def start(self) -> None:
        self.a.start(self.snapshot("a"))
        self.b.start(self.snapshot("b"))

    def snapshot(self, host: str, allow: str = '["a/ledger"]', lifetime: float = 3600) -> Snapshot:
        self._generation += 1
        now = time.time()
        intermediate = make_intermediate(self.root, DOMAIN, host, now)
        names = {"a": ["ledger"], "b": ["core"]}[host]
        leaves = [make_leaf(intermediate, SpiffeId(DOMAIN, host, name), now, lifetime) for name in names]
        texts = tuple(
            LeafText(
                leaf.identity.uri,
                leaf.chain_pem.decode(),
                leaf.key_pem.decode(),
                leaf.not_before,
                leaf.not_after,
                leaf.serial,
            )
            for leaf in leaves
        )
        policy = f"version: 1\nrules:\n  - name: ledger-core\n    allow: {{from: {allow}, to: [core]}}\n"
        return Snapshot(
            self._generation, (("policy.yaml", policy),), ("services", "replaced by directory()"),
            self.root.certificate_pem.decode(), texts,
        )  # fmt: skip

    def directory(self) -> Directory:
        """Built by hand, because a services file refuses loopback addresses, and there is nothing else here."""
        endpoint = Endpoint("b", ip_address("127.0.0.1"))
        service = Service("core", "core", (PortRange(self.port, self.port),), (endpoint,), (ip_address("127.9.9.9"),))
        tunnels = {host: (ip_address("127.0.0.1"), port) for host, port in zip("ab", self.tunnel_ports, strict=True)}
        return Directory({host: MeshHost(host, where) for host, where in tunnels.items()}, {"core": service})

    def dial(self) -> socket.socket:
        sock = socket.create_connection(self.a.capture.getsockname(), WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """(the client's socket, the server's)."""
        client = self.dial()
        server, _ = self.app.accept()
        server.settimeout(WAIT_S)
        return client, server

    def close(self) -> None:
        for proxy in (self.a, self.b):
            proxy.close()
        self.app.close()


@contextlib.contextmanager
def running(limits: str = "", ways: tuple[str, str] | None = None, start: bool = True) -> Iterator[Pair]:
    """`ways`: how a and b carry bytes, each one of WAYS; as the machine has it when not given."""
    with contextlib.ExitStack() as stack:
        if ways is not None:
            stack.enter_context(mock.patch("agent.proxy.loop.engine.make", _makers(ways)))
        pair = Pair(limits)
    with mock.patch("agent.proxy.state.load_directory", return_value=pair.directory()):
        if start:
            pair.start()
        try:
            yield pair
        finally:
            pair.close()


def _makers(ways: tuple[str, str]) -> Callable[[int], Any]:
    """Engines for two proxies, which are made one after the other."""
    left = iter(ways)

    def make(epoll_fd: int) -> Any:
        if next(left) == "python":
            return None
        made = engine_make(epoll_fd)
        return made if made is not None else pytest.fail("the engine is not built; ./run install builds it")

    return make


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def _config(host: str, limits: str) -> Config:
    rules = ", ".join(f"{{application: {name}, match: {{cgroup: /test/{name}}}}}" for name in ("ledger", "core"))
    text = f"host: {host}\ntrust_domain: {DOMAIN}\nidentities: [{rules}]\n"
    return load_config(text + limits, "config.yaml")
