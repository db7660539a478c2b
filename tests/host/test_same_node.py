"""Applications of one host that talk to each other: directly where the policy allows it, and never unaccounted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address
from multiprocessing.connection import Connection
from typing import Any

import pytest

from agent import bpfcall, records
from agent.records import Closing, VerdictKind
from agent.ring import Ring
from tests.host.kernel_fixture import V4, V6, Kernel, wait_until
from tests.host.test_hooks_capture import connect, family_of, moved, proxy
from tests.world.mesh import Mesh, write
from tests.world.place import PIPE, PYTHON, run, spawn
from tests.world.wait import until
from tests.world.world import World

SENT, ANSWERED = 200, 300
PORTS = itertools.count(3000)

# --- the kernel side alone


def closes(kernel: Kernel) -> list[Closing]:
    with closing(Ring(kernel.map("closes").fd)) as ring:
        return [records.unpack_closing(record) for record in ring.read()]


def allow(kernel: Kernel, address: str, local: bool = True) -> int:
    """A port whose service the application may reach."""
    port = next(PORTS)
    kernel.protect(address, port, service=port, local=local)
    kernel.judge(port, VerdictKind.ALLOW, rule=4712, caller=500)
    kernel.lease(60)
    closes(kernel)
    return port


Server = Callable[[socket.socket], None]


def serve(kernel: Kernel, address: str, port: int, server: Server) -> Any:
    def body(talk: Connection) -> Any:
        with socket.create_server((address, port), family=family_of(address)) as listener:
            talk.send("listening")
            accepted, peer = listener.accept()
            with accepted:
                server(accepted)
            return peer[:2]

    child = kernel.start(body, "server")
    assert child.receive() == "listening"
    return child


def receive(sock: socket.socket, size: int) -> None:
    while size:
        size -= len(sock.recv(size)) or pytest.fail("ended too early")


def answer(sock: socket.socket) -> None:
    """And then wait for the client's end."""
    receive(sock, SENT)
    sock.sendall(bytes(ANSWERED))
    assert sock.recv(1) == b""


def answer_and_close(sock: socket.socket) -> None:
    receive(sock, SENT)
    sock.sendall(bytes(ANSWERED))


def answer_and_reset(sock: socket.socket) -> None:
    answer_and_close(sock)
    time.sleep(0.1)
    reset(sock)


def answer_and_linger(sock: socket.socket) -> None:
    """Does not close before the client has gone."""
    receive(sock, SENT)
    assert sock.recv(1) == b""
    sock.sendall(bytes(ANSWERED))
    time.sleep(0.5)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def ask(sock: socket.socket) -> None:
    sock.sendall(bytes(SENT))
    receive(sock, ANSWERED)


def close_first(sock: socket.socket) -> None:
    ask(sock)


def half_close(sock: socket.socket) -> None:
    ask(sock)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""


def close_after_the_server(sock: socket.socket) -> None:
    ask(sock)
    assert sock.recv(1) == b""
    time.sleep(0.05)


def reset_first(sock: socket.socket) -> None:
    ask(sock)
    reset(sock)


def be_reset(sock: socket.socket) -> None:
    ask(sock)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def leave_before_the_end(sock: socket.socket) -> None:
    """Half closed, and gone before the server has said that it is done."""
    sock.sendall(bytes(SENT))
    sock.shutdown(socket.SHUT_WR)
    receive(sock, ANSWERED)


def forgive_reset(server: Server) -> Server:
    def body(sock: socket.socket) -> None:
        with suppress(ConnectionResetError):
            server(sock)

    return body


ESTABLISHED, SYN_SENT, FIN_WAIT2, LAST_ACK = 1, 2, 5, 9
ENDINGS: dict[str, tuple[Server, Server, set[int]]] = {
    "the client closes": (close_first, answer, {FIN_WAIT2}),
    "the client half-closes": (half_close, answer, {FIN_WAIT2}),
    "the server closes": (close_after_the_server, answer_and_close, {LAST_ACK}),
    "the client resets": (reset_first, forgive_reset(answer), {ESTABLISHED}),
    "the server resets": (be_reset, answer_and_reset, {ESTABLISHED}),
    "the client leaves early": (leave_before_the_end, answer_and_linger, {FIN_WAIT2}),
}


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_direct_flow_is_told_at_its_end_with_every_byte(kernel: Kernel, address: str, ending: str) -> None:
    client, server, states = ENDINGS[ending]
    port = allow(kernel, address)
    before = kernel.exits()

    def body(_talk: Connection) -> Any:
        with socket.create_connection((address, port)) as sock:
            names = sock.getsockname()[:2], sock.getpeername()[:2]
            client(sock)
        return names

    started = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    far = serve(kernel, address, port, server)
    child = kernel.start(body)
    own, peer = child.result()
    assert peer == (address, port)
    assert far.result() == own, "the server sees the client itself"
    told: list[Closing] = []

    def read() -> bool:
        told.extend(closes(kernel))
        return bool(told)

    wait_until(read)
    (end,) = told
    assert (end.bytes_sent, end.bytes_received, end.state in states) == (SENT, ANSWERED, True), end
    assert (end.original, end.original_port) == (ip_address(address), port)
    assert (end.source, end.source_port) == (ip_address(own[0]), own[1])
    assert (end.caller, end.service, end.rule) == (500, port, 4712)
    assert (end.pid, end.uid, end.cgroup) == (child.pid, 0, kernel.cgroup_id("app"))
    assert started < end.started_ns < end.connected_ns < end.at_ns < time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert end.rtt_us > 0
    assert moved(before, kernel.exits()) == {"direct": 1}
    assert kernel.flows() == []


def test_a_mapped_address_goes_directly_too(kernel: Kernel) -> None:
    port = allow(kernel, V4)
    far = serve(kernel, V4, port, lambda sock: None)
    peer, own = kernel.run(lambda: connect(f"::ffff:{V4}", port))
    assert peer == (f"::ffff:{V4}", port)
    assert far.result() == (V4, own[1])
    wait_until(lambda: [end.source for end in closes(kernel)] == [ip_address(V4)])


def test_many_bytes_are_counted_exactly(kernel: Kernel) -> None:
    port, size = allow(kernel, V4), 20_000_000

    def swallow(sock: socket.socket) -> None:
        receive(sock, size)
        sock.sendall(bytes(size))

    def client() -> None:
        with socket.create_connection((V4, port)) as sock:
            sock.sendall(bytes(size))
            sock.shutdown(socket.SHUT_WR)
            receive(sock, size)
            assert sock.recv(1) == b""

    far = serve(kernel, V4, port, swallow)
    kernel.run(client)
    far.result()
    wait_until(lambda: [(end.bytes_sent, end.bytes_received) for end in closes(kernel)] == [(size, size)])


def test_a_direct_connect_that_nobody_takes_is_refused_naturally_and_told(kernel: Kernel) -> None:
    port = allow(kernel, V4)
    assert kernel.run(lambda: connect(V4, port)) == errno.ECONNREFUSED
    (end,) = closes(kernel)
    assert (end.state, end.connected_ns, end.bytes_sent, end.bytes_received) == (SYN_SENT, 0, 0, 0)


def test_a_socket_used_again_is_told_each_time(kernel: Kernel) -> None:
    port = allow(kernel, V4)

    def client() -> list[int]:
        with socket.socket() as sock:
            return [sock.connect_ex((V4, port)) for _ in range(3)]

    assert kernel.run(client) == [errno.ECONNREFUSED] * 3
    assert [end.state for end in closes(kernel)] == [SYN_SENT] * 3


@pytest.mark.parametrize("why", ["not local", "lease over", "unknown caller"])
def test_when_unsure_it_goes_to_the_proxy(kernel: Kernel, why: str) -> None:
    port = allow(kernel, V4, local=why != "not local")
    if why == "lease over":
        kernel.lease(-1)
    far = proxy(kernel)
    before = kernel.exits()
    kernel.run(lambda: connect(V4, port), "server" if why == "unknown caller" else "app")
    (flow,) = far.result()
    assert flow.original_port == port
    assert moved(before, kernel.exits()) == {"captured": 1, "published": 1, "taken": 1}
    assert closes(kernel) == []


def test_a_denied_caller_is_refused_also_where_others_go_directly(kernel: Kernel) -> None:
    port = allow(kernel, V4)
    kernel.judge(port, VerdictKind.DENY, rule=1)
    assert kernel.run(lambda: connect(V4, port)) == errno.EPERM
    assert closes(kernel) == []


def test_a_full_ring_of_closes_is_counted_and_lets_connect(kernel: Kernel) -> None:
    port = allow(kernel, V4)
    before = kernel.exits()
    count = 9000

    def client() -> set[Any]:
        return {connect(V4, port) for _ in range(count)}

    assert kernel.run(client) == {errno.ECONNREFUSED}
    kept = len(closes(kernel))
    assert moved(before, kernel.exits()) == {"direct": count, "event_lost": count - kept}
    assert 7000 < kept < count


# --- with the whole agent

MESH = Mesh(
    applications={"a": ["ledger", "batch", "core"], "b": []},
    services={
        "core": {
            "application": "core",
            "ports": [9000, "9100-9101"],
            "endpoints": [{"host": "a", "address": "10.77.0.1"}, {"host": "a", "address": "fd77::1"}],
            "addresses": ["10.99.0.9"],
        }
    },
    rules=[{"name": "ledger-core", "allow": {"from": ["a/ledger"], "to": ["core"]}}],
)
ADDRESSES = ["10.77.0.1", "fd77::1"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World("samenode") as made:
        made.deploy(MESH)
        made.a.start()
        made.a.wait_ready()
        yield made


@contextmanager
def echo(world: World, port: int, application: str = "core", address: str = "10.77.0.1") -> Iterator[Any]:
    """Its first line is read: it listens. The others name its clients."""
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    command = [PYTHON, "-m", "tests.apps.echo", "serve", "--listen", where]
    process = spawn(world.a.place(application), command, stdout=PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.stdout
    finally:
        process.terminate()
        process.wait(10)


SHARED = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 9101), reuse_port=True)
print("listening", flush=True)
time.sleep(60)
"""


@contextmanager
def shared(world: World, application: str, address: str) -> Iterator[None]:
    """Listens at port 9101 together with others."""
    process = spawn(world.a.place(application), [PYTHON, "-c", SHARED, address], stdout=PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield
    finally:
        process.terminate()
        process.wait(10)


def talk(world: World, port: int, application: str = "ledger", address: str = "10.77.0.1") -> dict[str, Any] | str:
    """What the echo client says, or the last line of its complaint."""
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    command = [PYTHON, "-m", "tests.apps.echo", "client", "--connect", where, "--json", "--count", "5", "--size", "200"]
    done = world.a.run(application, command)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def exits(world: World) -> dict[str, int]:
    found: dict[str, int] = json.loads(world.a.cli("hooks", "status", "--json").stdout)["exits"]
    return found


def outcomes(world: World, old: int) -> list[dict[str, Any]]:
    return world.a.outcomes()[old:]


def both(world: World, old: int) -> list[dict[str, Any]]:
    """The outcomes of a flow that went through the proxies, one for each side."""
    until(lambda: len(outcomes(world, old)) >= 2, 5, "both outcomes")
    return outcomes(world, old)


def go_direct(world: World, port: int, address: str) -> None:
    """Hooks has seen the listener."""
    until(lambda: marked(world, port, address), 5, f"{address} port {port} to be marked as local")


def marked(world: World, port: int, address: str = "10.77.0.1") -> bool:
    return bool(records.SERVICE.unpack(_service(world, port, address))[2])


def _service(world: World, port: int, address: str) -> bytes:
    fd = bpfcall.get(str(world.a.directory / "bpf" / "services"))
    try:
        return bpfcall.Map(fd).lookup(records.service_key(ip_address(address), port)) or bytes(records.SERVICE.size)
    finally:
        os.close(fd)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_allowed_application_reaches_its_neighbour_directly(world: World, address: str) -> None:
    with echo(world, 9000, address=address) as server:
        go_direct(world, 9000, address)
        old, before = len(world.a.outcomes()), exits(world)
        found = talk(world, 9000, address=address)
        assert isinstance(found, dict), found
        assert json.loads(server.readline())["peer"] == found["local"], "the real client, port and all"
        (told,) = until(lambda: outcomes(world, old), 5, "the outcome")
    assert moved(before, exits(world)) == {"direct": 1} | _noise(moved(before, exits(world)))
    assert told["path"] == "direct"
    assert (told["event"], told["verdict"], told["reason"]) == ("close", "allow", "allowed")
    assert told["rule"] == "ledger-core"
    assert told["source"] == "spiffe://demo.bank/a/ledger"
    assert told["destination"] == "spiffe://demo.bank/a/core"
    assert (told["service"], told["side"], told["tls"]) == ("core", "source", None)
    assert (told["bytes_sent"], told["bytes_received"]) == (found["bytes"], found["bytes"])
    assert (told["client"], told["server"], told["close_reason"]) == (found["local"], found["peer"], "ended")
    assert told["duration_ms"] >= told["connect_ms"] > 0
    assert told["rtt_us"] > 0
    assert len(told["connection"]) == 32


def _noise(changes: dict[str, int]) -> dict[str, int]:
    """The command line asks the admin socket or port meanwhile."""
    return {name: count for name, count in changes.items() if name in ("unprotected", "exempt")}


def test_a_denied_application_is_refused_in_connect(world: World) -> None:
    with echo(world, 9000):
        go_direct(world, 9000, "10.77.0.1")
        old = len(world.a.outcomes())
        assert "Operation not permitted" in str(talk(world, 9000, "batch"))
        (told,) = until(lambda: outcomes(world, old), 5, "the outcome")
    assert (told["event"], told["verdict"], told["path"]) == ("deny", "deny", "")


def test_a_virtual_address_goes_through_the_proxy(world: World) -> None:
    """Nothing answers there, and the endpoint behind it is the proxy's choice."""
    with echo(world, 9000), echo(world, 9000, address="fd77::1"):
        go_direct(world, 9000, "10.77.0.1")
        old = len(world.a.outcomes())
        assert isinstance(talk(world, 9000, address="10.99.0.9"), dict)
        told = both(world, old)
    assert {each["path"] for each in told} == {"tunnel"}


def test_an_impostor_is_not_served_directly(world: World) -> None:
    with echo(world, 9100, application="batch"):
        time.sleep(1.5)
        assert not marked(world, 9100)
        old, before = len(world.a.outcomes()), exits(world)
        assert isinstance(talk(world, 9100), str)
        told = both(world, old)
    assert moved(before, exits(world)).get("direct", 0) == 0
    assert any("another application listens there" in each["reason"] for each in told), told


def test_an_impostor_beside_the_right_one_ends_direct_connections(world: World) -> None:
    """Both could be given the connection: one listens on the address, the other on every address."""
    with shared(world, "core", "10.77.0.1"):
        go_direct(world, 9101, "10.77.0.1")
        with shared(world, "batch", "0.0.0.0"):
            until(lambda: not marked(world, 9101), 5, "the mark to go")
        go_direct(world, 9101, "10.77.0.1")
    until(lambda: not marked(world, 9101), 5, "the mark to go with the listener")


def test_an_address_that_leaves_the_host_is_not_dialled_directly_any_more(world: World) -> None:
    """At once, and not at the next look: it may be on another host already."""
    with echo(world, 9000, address="0.0.0.0"):
        go_direct(world, 9000, "10.77.0.1")
        place = world.a.place("admin")
        links = json.loads(run(place, ["ip", "-j", "addr"], check=True).stdout)
        ((device, bits),) = [
            (link["ifname"], str(each["prefixlen"]))
            for link in links
            for each in link["addr_info"]
            if each["local"] == "10.77.0.1"
        ]
        run(place, ["ip", "addr", "del", f"10.77.0.1/{bits}", "dev", device], check=True)
        until(lambda: not marked(world, 9000), 0.5, "the mark to go", every_s=0.002)
        run(place, ["ip", "addr", "add", f"10.77.0.1/{bits}", "dev", device], check=True)
        go_direct(world, 9000, "10.77.0.1")


def test_mtls_sends_neighbours_through_the_proxy(world: World) -> None:
    path = world.a.directory / "policy.d" / "policy.yaml"
    with echo(world, 9000) as server:
        go_direct(world, 9000, "10.77.0.1")
        write(path, MESH.policy() | {"same_node": "mtls"})
        until(lambda: not marked(world, 9000), 5, "the mark to go with the policy")
        old = len(world.a.outcomes())
        found = talk(world, 9000)
        assert isinstance(found, dict), found
        assert json.loads(server.readline())["peer"] == found["local"]
        told = both(world, old)
        write(path, MESH.policy())
        go_direct(world, 9000, "10.77.0.1")
    assert {each["side"] for each in told} == {"source", "destination"}
    assert {each["path"] for each in told} == {"tunnel"}
    assert all(each["tls"]["version"] == "TLSv1.3" for each in told)


HOLD = """
import socket, sys
sock = socket.create_connection(("10.77.0.1", int(sys.argv[1])))
sock.sendall(b"x")
print(sock.recv(1), flush=True)
try:
    print(sock.recv(1), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


def test_a_direct_connection_is_cut_when_the_policy_no_longer_allows_it(world: World) -> None:
    path = world.a.directory / "policy.d" / "policy.yaml"
    with echo(world, 9000):
        go_direct(world, 9000, "10.77.0.1")
        old = len(world.a.outcomes())
        process = spawn(world.a.place("ledger"), [PYTHON, "-c", HOLD, "9000"], stdout=PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "b'x'\n"
        write(path, {"version": 1, "rules": []})
        assert process.stdout.readline() == "ConnectionAbortedError\n"
        assert process.wait(5) == 0
        (told,) = until(lambda: outcomes(world, old), 5, "the outcome")
        assert "Operation not permitted" in str(talk(world, 9000))
        write(path, MESH.policy())
        until(lambda: isinstance(talk(world, 9000), dict), 10, "the policy of before")
    assert (told["path"], told["close_reason"], told["bytes_sent"]) == ("direct", "reset", 1)


def test_without_an_agent_direct_connections_end_with_their_lease(world: World) -> None:
    """Nobody verifies any more who listens."""
    with echo(world, 9000):
        go_direct(world, 9000, "10.77.0.1")
        world.a.let_go()
        world.a.kill_agent()
        assert isinstance(talk(world, 9000), dict), "a restart of the agent disturbs nobody"
        until(lambda: isinstance(talk(world, 9000), str), 15, "the lease to end")
        assert "Connection refused" in str(talk(world, 9000))
        world.a.start()
        world.a.wait_ready()
        until(lambda: isinstance(talk(world, 9000), dict), 10, "direct connections again")
