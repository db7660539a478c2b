"""PROXY protocol version 2, binary header with TLVs. Source: HAProxy doc/proxy-protocol.txt, section 2.2.

Strict where the source lets a receiver skip: TCP only, no LOCAL, every length exact, one encoding per meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from struct import Struct

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
VERSION_2_PROXY = 0x21
TCP_IPV4 = 0x11
TCP_IPV6 = 0x21
CRC32C = 0x03

_FIXED = Struct(">12sBBH")
_ADDRESSES = {TCP_IPV4: Struct(">4s4sHH"), TCP_IPV6: Struct(">16s16sHH")}
_TLV = Struct(">BH")
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96

Address = IPv4Address | IPv6Address
SocketAddress = tuple[Address, int]
Tlv = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Header:
    """Who talks to whom, and what else the sender says. IPv4-mapped IPv6 addresses always read as IPv4."""

    source: SocketAddress
    destination: SocketAddress
    tlvs: tuple[Tlv, ...] = ()


def encode(header: Header) -> bytes:
    """ValueError if an address, port or length does not fit."""
    source, destination = _plain(header.source[0]), _plain(header.destination[0])
    family = TCP_IPV4 if source.version == destination.version == 4 else TCP_IPV6
    ports = _checked_port(header.source[1]), _checked_port(header.destination[1])
    addresses = _ADDRESSES[family].pack(_packed(source, family), _packed(destination, family), *ports)
    body = addresses + b"".join(_encode_tlv(kind, value) for kind, value in header.tlvs)
    if len(body) > 0xFFFF:
        raise ValueError("proxy header is longer than its length field can say")
    return _FIXED.pack(SIGNATURE, VERSION_2_PROXY, family, len(body)) + body


def decode(data: bytes) -> Header:
    """`data` is exactly one header; ValueError on anything else."""
    if len(data) < _FIXED.size:
        raise ValueError("proxy header is cut short")
    signature, version, family, length = _FIXED.unpack_from(data)
    if signature != SIGNATURE:
        raise ValueError("proxy header has no version 2 signature")
    if version != VERSION_2_PROXY:
        raise ValueError(f"proxy version and command {version:#04x} is not supported; expected {VERSION_2_PROXY:#04x}")
    if family not in _ADDRESSES:
        raise ValueError(f"proxy address family {family:#04x} is not supported; expected tcp over ipv4 or ipv6")
    if length != len(data) - _FIXED.size:
        raise ValueError(f"proxy header says {length} bytes follow, but {len(data) - _FIXED.size} do")
    if length < _ADDRESSES[family].size:
        raise ValueError("proxy header ends inside its addresses")
    source, destination = _decode_addresses(data, family)
    return Header(source, destination, tuple(_decode_tlvs(data, _FIXED.size + _ADDRESSES[family].size)))


def _plain(ip: Address) -> Address:
    if isinstance(ip, IPv4Address):
        return ip
    if ip.scope_id is not None:
        raise ValueError(f"address {ip} has a scope, which means nothing on another host")
    return ip.ipv4_mapped or ip


def _packed(ip: Address, family: int) -> bytes:
    return _MAPPED + ip.packed if family == TCP_IPV6 and ip.version == 4 else ip.packed


def _checked_port(port: int) -> int:
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"port {port} is not within 0 to 65535")
    return port


def _encode_tlv(kind: int, value: bytes) -> bytes:
    if kind == CRC32C:
        raise ValueError("proxy checksum (crc32c) is not supported")
    if not 0 <= kind <= 0xFF or len(value) > 0xFFFF:
        raise ValueError(f"proxy field {kind:#04x} of {len(value)} bytes does not fit")
    return _TLV.pack(kind, len(value)) + value


def _decode_addresses(data: bytes, family: int) -> tuple[SocketAddress, SocketAddress]:
    packed_source, packed_destination, source_port, destination_port = _ADDRESSES[family].unpack_from(
        data, _FIXED.size
    )
    source, destination = _unpacked(packed_source), _unpacked(packed_destination)
    if family == TCP_IPV6 and source.version == destination.version == 4:
        raise ValueError("proxy header maps two ipv4 addresses into ipv6; send tcp over ipv4")
    return (source, source_port), (destination, destination_port)


def _unpacked(packed: bytes) -> Address:
    return ip_address(packed.removeprefix(_MAPPED) if len(packed) == 16 else packed)


def _decode_tlvs(data: bytes, at: int) -> Iterator[Tlv]:
    while at < len(data):
        if len(data) - at < _TLV.size:
            raise ValueError("proxy header ends inside a field's head")
        kind, length = _TLV.unpack_from(data, at)
        at += _TLV.size
        if length > len(data) - at:
            raise ValueError(f"proxy field {kind:#04x} says {length} bytes, but {len(data) - at} are left")
        if kind == CRC32C:  # must be verified if read at all; TLS has verified these bytes already
            raise ValueError("proxy checksum (crc32c) is not supported")
        yield kind, data[at : at + length]
        at += length
