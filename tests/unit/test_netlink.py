"""What the kernel says of our own sockets and addresses; needs no root."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import pytest

from agent import host, netlink
from agent.netlink import CONNECTED, LISTEN


@pytest.mark.parametrize(("address", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("0.0.0.0", "0.0.0.0")])
def test_a_listener_is_seen_with_its_owner(address: str, shown: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        (found,) = [each for each in netlink.sockets(LISTEN) if each.port == port]
        assert (found.address, found.uid, found.family) == (ip_address(shown), os.getuid(), family)
        assert found.cgroup > 0
        dialled = ip_address("::1" if family == socket.AF_INET6 else "127.0.0.1")
        (owner,) = host.listener_owners(dialled, port, with_pids=False)
        assert (owner.cgroup, owner.uid) == (found.cgroup, os.getuid())
        elsewhere = host.listener_owners(ip_address("192.0.2.1"), port, with_pids=False)
        assert elsewhere == ([owner] if address == "0.0.0.0" else [])


def test_a_mapped_connection_is_shown_as_ipv4() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(("::ffff:127.0.0.1", listener.getsockname()[1])) as client,
    ):
        own = client.getsockname()[1]
        (found,) = [each for each in netlink.sockets(CONNECTED) if each.port == own]
        assert (found.address, found.peer) == (ip_address("127.0.0.1"), ip_address("127.0.0.1"))
        assert found.peer_port == listener.getsockname()[1]


def test_many_listeners_arrive_in_several_pieces() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(400)]
    try:
        ports = {each.getsockname()[1] for each in listeners}
        assert ports <= {each.port for each in netlink.sockets(LISTEN)}
    finally:
        for each in listeners:
            each.close()


def test_only_addresses_of_this_host_are_local() -> None:
    here = {ip_address(text) for text in ("127.0.0.1", "127.9.9.9", "::1")}
    there = {ip_address(text) for text in ("192.0.2.1", "2001:db8::1")}
    assert netlink.local_addresses(here | there) == here
    assert netlink.local_addresses([]) == set()


def test_changes_of_addresses_can_be_waited_for() -> None:
    with netlink.address_changes() as changes, pytest.raises(BlockingIOError):
        changes.recv(1)
