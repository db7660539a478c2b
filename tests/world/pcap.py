"""A capture file to packets (pure): Ethernet, IPv4, IPv6, TCP. What cannot be understood says so, it never vanishes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address

ETHERNET = 1
_HEADER, _RECORD = 24, 16
_ORDERS = {
    b"\xd4\xc3\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\x4d\x3c\xb2\xa1": "<",  # the same two with nanoseconds
    b"\xa1\xb2\x3c\x4d": ">",
}
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_ICMP, _TCP, _ICMPV6 = 1, 6, 58
_SKIPPED_HEADERS = (0, 43, 60)  # hop-by-hop, routing, destination options: 8-byte units after the first
FIN, SYN, RST, ACK = 1, 2, 4, 16


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP packet."""

    source: tuple[str, int]
    target: tuple[str, int]
    sequence: int
    flags: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Other:
    """A packet that is not TCP. `housekeeping`: ARP and ICMP, which carry nothing of an application's."""

    what: str
    size: int
    housekeeping: bool = False


@dataclass(frozen=True, slots=True)
class Packet:
    raw: bytes
    content: Segment | Other


def read_pcap(data: bytes) -> list[Packet]:
    order = _ORDERS.get(data[:4])
    if order is None or len(data) < _HEADER:
        raise ValueError("not a pcap file: its first bytes are no pcap magic")
    (link,) = struct.unpack_from(f"{order}I", data, 20)
    if link != ETHERNET:
        raise ValueError(f"expected Ethernet packets, got link type {link}")
    packets = []
    at = _HEADER
    while at + _RECORD <= len(data):
        kept, size = struct.unpack_from(f"{order}II", data, at + 8)
        raw = data[at + _RECORD : at + _RECORD + kept]
        at += _RECORD + kept
        if at > len(data):
            break  # tcpdump was killed while writing its last packet
        packets.append(Packet(raw, _ethernet(raw) if kept == size else Other("cut short", size)))
    return packets


def _ethernet(raw: bytes) -> Segment | Other:
    kind = int.from_bytes(raw[12:14])
    try:
        if kind == _IPV4:
            return _ipv4(raw[14:])
        if kind == _IPV6:
            return _ipv6(raw[14:])
    except (IndexError, struct.error):
        return Other("malformed", len(raw))
    return Other("ARP", len(raw), housekeeping=True) if kind == _ARP else Other(f"ethertype 0x{kind:04x}", len(raw))


def _ipv4(packet: bytes) -> Segment | Other:
    length = int.from_bytes(packet[2:4])
    if length > len(packet):
        return Other("malformed", len(packet))
    packet = packet[:length]  # Ethernet pads short frames
    if int.from_bytes(packet[6:8]) & 0x3FFF:
        return Other("IP fragment", len(packet))
    header = (packet[0] & 0x0F) * 4
    return _transport(packet[9], packet[header:], packet[12:16], packet[16:20])


def _ipv6(packet: bytes) -> Segment | Other:
    length = int.from_bytes(packet[4:6])
    if 40 + length > len(packet):
        return Other("malformed", len(packet))
    protocol, rest = packet[6], packet[40 : 40 + length]
    while protocol in _SKIPPED_HEADERS:
        protocol, rest = rest[0], rest[8 + rest[1] * 8 :]
    return _transport(protocol, rest, packet[8:24], packet[24:40])


def _transport(protocol: int, rest: bytes, source: bytes, target: bytes) -> Segment | Other:
    if protocol != _TCP:
        return Other(f"IP protocol {protocol}", len(rest), housekeeping=protocol in (_ICMP, _ICMPV6))
    source_port, target_port, sequence, _, offset, flags = struct.unpack_from("!HHIIBB", rest)
    payload = rest[(offset >> 4) * 4 :]
    return Segment((_show(source), source_port), (_show(target), target_port), sequence, flags, payload)


def _show(address: bytes) -> str:
    return str(ip_address(address))
