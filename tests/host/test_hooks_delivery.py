"""The accepting side: which client a server sees when the proxy delivers a flow to it."""

from __future__ import annotations

import errno
import socket
import sys
from ipaddress import ip_address
from multiprocessing.connection import Connection
from typing import Any

import pytest

from agent import records
from tests.host.conftest import NewKernel
from tests.host.kernel_fixture import V4, V6, Child, Kernel

CLIENT4, CLIENT6 = ip_address("192.0.2.7"), ip_address("2001:db8::7")


def server(kernel: Kernel, address: str, port: int, dual_stack: bool = False) -> Child:
    """Accepts one connection; tells what accept(), getpeername() and getsockname() answer."""

    def body(talk: Connection) -> list[Any]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, port), family=family, dualstack_ipv6=dual_stack) as listener:
            talk.send("listening")
            accepted, peer = listener.accept()
            with accepted:
                return [peer[:2], accepted.getpeername()[:2], accepted.getsockname()[:2]]

    child = kernel.start(body, "server")
    assert child.receive() == "listening"
    return child


def deliver(kernel: Kernel, address: str, port: int, client: records.Address | None, client_port: int = 40000) -> int:
    """What the proxy does; the errno of its connect."""

    def body() -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as sock:
            if client is not None:
                note = records.delivered(client, client_port, ip_address(address), port)
                kernel.map("socket_flows").update(sock.fileno().to_bytes(4, sys.byteorder), note)
            return sock.connect_ex((address, port))

    error = kernel.run(body, "agent")
    assert isinstance(error, int)
    return error


@pytest.mark.parametrize(
    ("listening", "dialled", "client", "seen"),
    [
        (V4, V4, CLIENT4, "192.0.2.7"),
        (V6, V6, CLIENT6, "2001:db8::7"),
        ("::", V6, CLIENT6, "2001:db8::7"),
        ("::", V4, CLIENT4, "::ffff:192.0.2.7"),
        ("::", V4, CLIENT6, "2001:db8::7"),
        (V6, V6, CLIENT4, "::ffff:192.0.2.7"),
    ],
    ids=["v4", "v6", "dual-stack-v6", "dual-stack-v4", "dual-stack-v4-for-a-v6-client", "v6-for-a-v4-client"],
)
def test_the_server_sees_the_client(
    kernel: Kernel, listening: str, dialled: str, client: records.Address, seen: str
) -> None:
    before = kernel.exits()
    far = server(kernel, listening, 3000, dual_stack=listening == "::")
    assert deliver(kernel, dialled, 3000, client) == 0
    accepted, peer, own = far.result()
    assert accepted == peer == (seen, 40000)
    assert own[0].removeprefix("::ffff:") == dialled, "getsockname of the server stays its own address"
    after = kernel.exits()
    assert {name: after[name] - before[name] for name in ("published", "taken", "exempt")} == dict.fromkeys(
        ("published", "taken", "exempt"), 1
    )
    assert kernel.flows() == []


def test_an_ipv4_server_cannot_be_shown_an_ipv6_client(kernel: Kernel) -> None:
    """It sees the proxy; the proxy has to know that and decide whether to deliver at all."""
    far = server(kernel, V4, 3001)
    assert deliver(kernel, V4, 3001, CLIENT6) == 0
    assert far.result()[0][0] == V4


def test_a_connection_without_a_note_shows_whoever_dialled(kernel: Kernel) -> None:
    far = server(kernel, V4, 3002)
    assert deliver(kernel, V4, 3002, None) == 0
    assert far.result()[0][0] == V4


def test_the_agent_delivers_to_a_protected_address_without_being_captured(kernel: Kernel) -> None:
    kernel.protect(V4, 3003)
    far = server(kernel, V4, 3003)
    assert deliver(kernel, V4, 3003, CLIENT4) == 0
    assert far.result()[0] == ("192.0.2.7", 40000)


def test_a_failed_delivery_leaves_no_entry(kernel: Kernel) -> None:
    assert deliver(kernel, V4, 3004, CLIENT4) == errno.ECONNREFUSED
    assert kernel.flows() == []


def test_an_entry_that_nobody_could_take_goes_with_its_connection(kernel: Kernel) -> None:
    """The server is outside of the attached cgroups: it sees the proxy, and the table must not fill up for that."""

    def outside(talk: Connection) -> Any:
        with socket.create_server((V4, 3006)) as listener:
            talk.send("listening")
            accepted, peer = listener.accept()
            with accepted:
                talk.recv()
                accepted.recv(1)
            return peer

    far = kernel.start(outside, "/")
    far.receive()
    note = records.delivered(CLIENT4, 40000, ip_address(V4), 3006)

    def body() -> tuple[int, int]:
        with socket.socket() as sock:
            kernel.map("socket_flows").update(sock.fileno().to_bytes(4, sys.byteorder), note)
            sock.connect((V4, 3006))
            during = len(kernel.flows())
            far.talk.send("go on")
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
        return during, len(kernel.flows())

    assert kernel.run(body, "agent") == (1, 0)
    assert far.result()[0] == V4


def test_a_delivery_is_refused_when_the_table_is_full(new_kernel: NewKernel) -> None:
    """Else the server would take the proxy for its client."""
    kernel = new_kernel(max_flows=16)
    kernel.install()
    filled = kernel.fill_flows()
    server(kernel, V4, 3005)
    assert deliver(kernel, V4, 3005, CLIENT4) == errno.EPERM
    assert kernel.exits()["full"] == 1
    assert len(kernel.flows()) == filled
