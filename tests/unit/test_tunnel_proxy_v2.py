"""PROXY v2 headers and the OPEN payload: known bytes, round trips, every lie refused."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel import opening, proxy_v2
from agent.tunnel.frames import MAX_OPEN
from agent.tunnel.opening import Opening
from agent.tunnel.proxy_v2 import Address, Header
from policy.identity import SpiffeId

# The layout of proxy-protocol.txt section 2.2: signature, version 2 + PROXY, family, length, addresses, ports, TLVs.
SIGNATURE = "0d0a0d0a000d0a515549540a"
KNOWN = [
    (
        "tcp over ipv4",
        Header((IPv4Address("192.168.0.1"), 56324), (IPv4Address("192.168.0.11"), 443)),
        SIGNATURE + "21 11 000c c0a80001 c0a8000b dc04 01bb",
    ),
    (
        "tcp over ipv6",
        Header((IPv6Address("2001:db8::1"), 56324), (IPv6Address("2001:db8::2"), 443)),
        SIGNATURE + "21 21 0024 20010db8000000000000000000000001 20010db8000000000000000000000002 dc04 01bb",
    ),
    (
        "mixed: the ipv4 one is mapped",
        Header((IPv4Address("192.168.0.1"), 1), (IPv6Address("2001:db8::2"), 2)),
        SIGNATURE + "21 21 0024 00000000000000000000ffffc0a80001 20010db8000000000000000000000002 0001 0002",
    ),
    (
        "fields follow the addresses",
        Header((IPv4Address("10.0.0.1"), 1), (IPv4Address("10.0.0.2"), 2), ((0x05, b"id"), (0x04, b""))),
        SIGNATURE + "21 11 0014 0a000001 0a000002 0001 0002 05 0002 6964 04 0000",
    ),
]


@pytest.mark.parametrize(("header", "wire"), [case[1:] for case in KNOWN], ids=[case[0] for case in KNOWN])
def test_known_bytes_of_the_specification(header: Header, wire: str) -> None:
    assert proxy_v2.encode(header) == bytes.fromhex(wire)
    assert proxy_v2.decode(bytes.fromhex(wire)) == header


addresses = st.one_of(
    st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda ip: isinstance(ip, IPv6Address) and not ip.ipv4_mapped)
)
sockets = st.tuples(addresses, st.integers(0, 0xFFFF))
fields = st.lists(st.tuples(st.integers(0, 0xFF).filter(lambda kind: kind != 3), st.binary(max_size=40)), max_size=6)


@given(st.builds(Header, sockets, sockets, fields.map(tuple)))
def test_every_header_survives_the_wire(header: Header) -> None:
    assert proxy_v2.decode(proxy_v2.encode(header)) == header


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ("", "cut short"),
        (SIGNATURE + "21 11 00", "cut short"),
        ("0d0a0d0a000d0a515549540b 21 11 000c c0a80001 c0a8000b dc04 01bb", "no version 2 signature"),
        (SIGNATURE + "20 11 000c c0a80001 c0a8000b dc04 01bb", "0x20 is not supported"),  # LOCAL
        (SIGNATURE + "11 11 000c c0a80001 c0a8000b dc04 01bb", "0x11 is not supported"),
        (SIGNATURE + "22 11 000c c0a80001 c0a8000b dc04 01bb", "0x22 is not supported"),
        (SIGNATURE + "21 00 0000", "family 0x00"),
        (SIGNATURE + "21 12 000c c0a80001 c0a8000b dc04 01bb", "family 0x12"),  # UDP
        (SIGNATURE + "21 31 0000", "family 0x31"),  # unix
        (SIGNATURE + "21 11 000d c0a80001 c0a8000b dc04 01bb", "says 13 bytes follow, but 12 do"),
        (SIGNATURE + "21 11 000b c0a80001 c0a8000b dc04 01bb", "says 11 bytes follow, but 12 do"),
        (SIGNATURE + "21 11 000b c0a80001 c0a8000b dc04 01", "inside its addresses"),
        (SIGNATURE + "21 21 000c c0a80001 c0a8000b dc04 01bb", "inside its addresses"),
        (SIGNATURE + "21 11 000e c0a80001 c0a8000b dc04 01bb 05 00", "inside a field's head"),
        (SIGNATURE + "21 11 0010 c0a80001 c0a8000b dc04 01bb 05 0002 69", "says 2 bytes, but 1 are left"),
        (SIGNATURE + "21 11 0013 c0a80001 c0a8000b dc04 01bb 03 0004 00000000", "crc32c"),
        (
            SIGNATURE + "21 21 0024 00000000000000000000ffffc0a80001 00000000000000000000ffffc0a80002 0001 0002",
            "maps two ipv4 addresses",
        ),
    ],
)
def test_a_lying_or_foreign_header_is_refused(wire: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        proxy_v2.decode(bytes.fromhex(wire))


HERE, THERE = (IPv4Address("10.0.0.1"), 1), (IPv4Address("10.0.0.2"), 2)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (Header((ip_address("fe80::1%eth0"), 1), THERE), "scope"),
        (Header((HERE[0], 65536), THERE), "port 65536"),
        (Header(HERE, THERE, ((3, bytes(4)),)), "crc32c"),
        (Header(HERE, THERE, ((256, b""),)), "does not fit"),
        (Header(HERE, THERE, ((1, bytes(65536)),)), "does not fit"),
        (Header(HERE, THERE, ((1, bytes(40000)), (2, bytes(40000)))), "longer than its length field"),
    ],
)
def test_a_header_that_cannot_be_written_is_not(header: Header, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        proxy_v2.encode(header)


def test_mapped_addresses_are_sent_as_ipv4() -> None:
    mapped = Header((IPv6Address("::ffff:10.0.0.1"), 1), (IPv6Address("::ffff:10.0.0.2"), 2))
    assert proxy_v2.decode(proxy_v2.encode(mapped)) == Header(HERE, THERE)


# The OPEN payload

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OPENING = Opening(
    connection_id=bytes(range(16)),
    source=(IPv4Address("10.1.0.5"), 40312),
    destination=(IPv4Address("10.9.0.1"), 5432),
    identity=SpiffeId("bank.example", "a", "ledger"),
    service="accounts",
    traceparent=TRACE,
    hops=0,
)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
real_sockets = st.tuples(addresses.filter(lambda ip: not ip.is_unspecified), st.integers(1, 0xFFFF))
traces = st.builds(
    "00-{:032x}-{:016x}-{:02x}".format, st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255)
)
openings = st.builds(
    Opening,
    connection_id=st.binary(min_size=16, max_size=16),
    source=real_sockets,
    destination=real_sockets,
    identity=st.builds(SpiffeId, labels, labels, labels),
    service=labels,
    traceparent=st.none() | traces,
    hops=st.integers(0, 255),
)


@given(openings)
def test_every_opening_survives_the_wire(value: Opening) -> None:
    payload = opening.encode(value)
    assert len(payload) <= MAX_OPEN
    assert opening.decode(payload) == value


def header_with(*tlvs: tuple[int, bytes], without: int = -1) -> bytes:
    """The payload of OPENING without its trace, changed: fields of the same type are replaced, others added."""
    ours = [(kind, value) for kind, value in proxy_v2.decode(opening.encode(OPENING)).tlvs if kind != 0xE2]
    kept = [(kind, value) for kind, value in ours if kind != without and kind not in dict(tlvs)]
    return proxy_v2.encode(Header(OPENING.source, OPENING.destination, (*kept, *tlvs)))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (header_with(without=0x05), "0x05 is missing"),
        (header_with(without=0xE0), "0xe0 is missing"),
        (header_with(without=0xE1), "0xe1 is missing"),
        (header_with(without=0xE3), "0xe3 is missing"),
        (header_with((0xE1, b"one"), (0xE1, b"one")), "0xe1 comes twice"),
        (header_with((0xE2, TRACE.encode()), (0xE2, TRACE.encode())), "0xe2 comes twice"),
        (header_with((0xE4, b"")), "0xe4 is not known"),
        (header_with((0xEF, b"")), "0xef is not known"),
        (header_with((0x01, b"h2")), "0x01 is not known"),
        (header_with((0x30, b"ns")), "0x30 is not known"),
        (header_with((0x05, bytes(15))), "15 bytes"),
        (header_with((0x05, bytes(17))), "17 bytes"),
        (header_with((0xE0, b"spiffe://bank.example/a/../ledger")), "not an identity"),
        (header_with((0xE0, b"spiffe://bank.example/a/ledger\0")), "not an identity"),
        (header_with((0xE0, b"spiffe://bank.example/\xff/ledger")), "not ascii"),
        (header_with((0xE1, b"")), "not a service name"),
        (header_with((0xE1, b"Accounts")), "not a service name"),
        (header_with((0xE1, b"accounts\n")), "not a service name"),
        (header_with((0xE2, b"")), "not a traceparent"),
        (header_with((0xE2, TRACE.upper().encode())), "not a traceparent"),
        (header_with((0xE2, b"ff" + TRACE[2:].encode())), "not a traceparent"),
        (header_with((0xE2, TRACE.replace("00f067aa0ba902b7", "0" * 16).encode())), "not a traceparent"),
        (header_with((0xE3, b"")), "0 bytes"),
        (header_with((0xE3, b"\0\0")), "2 bytes"),
    ],
)
def test_an_open_with_a_missing_double_foreign_or_malformed_field_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        opening.decode(payload)


def test_padding_is_allowed_and_the_trace_is_optional() -> None:
    payload = header_with((0x04, b""), (0x04, bytes(9)))
    assert opening.decode(payload) == replace(OPENING, traceparent=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": (IPv4Address("10.0.0.1"), 0)}, "no port"),
        ({"destination": (IPv4Address("10.0.0.1"), 65536)}, "no port"),
        ({"source": (IPv6Address("::"), 1)}, "no address"),
        ({"hops": 256}, "hop count 256"),
    ],
)
def test_an_opening_that_means_nothing_cannot_be_made(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(OPENING, **change)


@given(st.binary(max_size=200).map(lambda tail: opening.encode(OPENING)[:16] + tail) | st.binary(max_size=300))
def test_random_payloads_are_refused_or_mean_something(payload: bytes) -> None:
    try:
        value = opening.decode(payload)
    except ValueError:
        return
    assert opening.decode(opening.encode(value)) == value


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_changed_byte_is_refused_or_means_something(position: int, byte: int) -> None:
    payload = bytearray(opening.encode(OPENING))
    payload[position % len(payload)] = byte
    try:
        value = opening.decode(bytes(payload))
    except ValueError:
        return
    assert opening.decode(opening.encode(value)) == value


def test_addresses_of_any_kind_are_of_the_kernel_records_type() -> None:
    source: Address = opening.decode(opening.encode(OPENING)).source[0]
    assert source == IPv4Address("10.1.0.5")
