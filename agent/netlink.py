"""Three questions to the kernel that are asked all the time, so in microseconds and without a library: who listens, who
is connected, is an address ours. And one order: cut a connection.

Sources: include/uapi/linux/{netlink,inet_diag,rtnetlink}.h. Errors are OSError with the kernel's errno.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from agent.records import Address

_ROUTE, _SOCK_DIAG = socket.NETLINK_ROUTE, 4
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_BY_FAMILY, _DESTROY = 20, 21
_GET_ROUTE, _DST, _RTN_LOCAL = 26, 1, 2
_ADDRESS_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_CGROUP_ID = 21  # INET_DIAG_CGROUP_ID, kernel 5.9

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SOCKET_ID = struct.Struct("=2s2s16s16sI8s")
_DIAG_REQUEST = struct.Struct("=BBBxI")
_DIAG_ANSWER = struct.Struct("=BBBB48sIIIII")
_ROUTE_MESSAGE = struct.Struct("=BBBBBBBBI")

LISTEN = 1 << 10
CONNECTED = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8  # established, SYN sent, FIN wait 1 and 2, close wait
_BUFFER = 1 << 16
_WITHIN_S = 2.0  # the kernel answers at once or never


@dataclass(frozen=True, slots=True)
class Socket:
    """A TCP socket as sock_diag(7) shows it: with the cgroup it was made in. IPv4-mapped addresses are plain IPv4."""

    address: Address
    port: int
    peer: Address
    peer_port: int
    cgroup: int
    uid: int
    family: int
    id: bytes  # struct inet_diag_sockid: names this very socket, and no later one


def sockets(states: int) -> list[Socket]:
    """Every TCP socket of this network namespace in one of these states."""
    found: list[Socket] = []
    with _open(_SOCK_DIAG) as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _DIAG_REQUEST.pack(family, socket.IPPROTO_TCP, 0, states) + bytes(48)
            found += map(_socket, _ask(sock, _BY_FAMILY, _DUMP, request))
    return found


def destroy(target: Socket) -> bool:
    """Reset a connection at both ends (CONFIG_INET_DIAG_DESTROY, kernel 4.5). False when it has just gone by itself."""
    with _open(_SOCK_DIAG) as sock:
        request = _DIAG_REQUEST.pack(target.family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + target.id
        try:
            list(_ask(sock, _DESTROY, _ACK, request))
        except FileNotFoundError:
            return False
    return True


def local_addresses(addresses: Iterable[Address]) -> set[Address]:
    """Those of `addresses` that the routing table delivers to this host itself."""
    with _open(_ROUTE) as sock:
        return {address for address in addresses if _is_local(sock, address)}


def address_changes() -> socket.socket:
    """Readable when an interface gained or lost an address; what it says does not matter."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE)
    sock.bind((0, _ADDRESS_GROUPS))
    sock.setblocking(False)
    return sock


def _is_local(sock: socket.socket, address: Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    bits = address.max_prefixlen
    message = _ROUTE_MESSAGE.pack(family, bits, 0, 0, 0, 0, 0, 0, 0)
    message += _ATTRIBUTE.pack(_ATTRIBUTE.size + bits // 8, _DST) + address.packed
    try:
        answers = list(_ask(sock, _GET_ROUTE, 0, message))
    except OSError:  # no route at all
        return False
    return any(_ROUTE_MESSAGE.unpack_from(answer)[7] == _RTN_LOCAL for answer in answers)


def _socket(answer: bytes) -> Socket:
    family, _state, _timer, _retrans, name, _expires, _rqueue, _wqueue, uid, _inode = _DIAG_ANSWER.unpack_from(answer)
    port, peer_port, own, peer, _interface, _cookie = _SOCKET_ID.unpack(name)
    cgroup = next((value for kind, value in _attributes(answer[_DIAG_ANSWER.size :]) if kind == _CGROUP_ID), b"")
    return Socket(
        _address(family, own), int.from_bytes(port, "big"), _address(family, peer), int.from_bytes(peer_port, "big"),
        struct.unpack("=Q", cgroup)[0] if cgroup else 0, uid, family, name,
    )  # fmt: skip


def _address(family: int, data: bytes) -> Address:
    if family == socket.AF_INET:
        return IPv4Address(data[:4])
    address = IPv6Address(data)
    return address.ipv4_mapped or address


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) // 4 * 4


def _open(protocol: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    sock.settimeout(_WITHIN_S)
    return sock


def _ask(sock: socket.socket, kind: int, flags: int, request: bytes) -> Iterator[bytes]:
    """One answer, or every answer of a dump, or none but the acknowledgement."""
    sock.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST | flags, 1, 0) + request)
    while True:
        data = sock.recv(_BUFFER)
        at = 0
        while at + _HEADER.size <= len(data):
            length, answer, _flags, _sequence, _port = _HEADER.unpack_from(data, at)
            body = data[at + _HEADER.size : at + length]
            if answer == _DONE:
                return
            if answer == _ERROR:
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return
            yield body
            at += (length + 3) // 4 * 4
        if not flags & _DUMP:
            return
