"""The judge of the wire (tests/world/pcap, streams, tls, wire): what is TLS 1.3 passes, and nothing else does."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.world.pcap import ACK, SYN, Other, Segment, read_pcap
from tests.world.streams import reassemble
from tests.world.wire import WireReport, inspect

TUNNEL = 15008
A, B = ("10.77.0.1", 40000), ("10.77.0.2", TUNNEL)
FIN_ACK = ACK | 1


def pcap(*packets: bytes, order: str = "<") -> bytes:
    header = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
    return header + b"".join(struct.pack(f"{order}IIII", 1, 0, len(raw), len(raw)) + raw for raw in packets)


def ethernet(kind: int, body: bytes) -> bytes:
    return bytes(12) + kind.to_bytes(2) + body


def tcp(source: tuple[str, int], target: tuple[str, int], sequence: int, flags: int, payload: bytes = b"") -> bytes:
    header = struct.pack("!HHIIBBHHH", source[1], target[1], sequence % (1 << 32), 0, 5 << 4, flags, 1000, 0, 0)
    return ip(source[0], target[0], 6, header + payload)


def ip(source: str, target: str, protocol: int, body: bytes) -> bytes:
    if ":" in source:
        ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
        return ethernet(0x86DD, struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + ends + body)
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    return ethernet(0x0800, struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + ends + body)


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("!BHH", kind, 0x0303, len(body)) + body


def client_hello() -> bytes:
    return record(22, b"\x01" + bytes(200))


def server_hello(version: int | None = 0x0304) -> bytes:
    """TLS 1.2 has no supported_versions extension, only the old version field."""
    extensions = struct.pack("!HHBB", 51, 2, 7, 7)
    if version is not None:
        extensions += struct.pack("!HHH", 43, 2, version)
    body = b"\x03\x03" + bytes(32) + b"\x20" + bytes(32) + b"\x13\x01\x00" + len(extensions).to_bytes(2) + extensions
    return record(22, b"\x02" + len(body).to_bytes(3) + body)


TLS_UP = client_hello() + record(20, b"\x01") + record(23, bytes(100))
TLS_DOWN = server_hello() + record(20, b"\x01") + record(23, bytes(300))


def connection(
    up: Sequence[bytes],
    down: Sequence[bytes],
    client: tuple[str, int] = A,
    server: tuple[str, int] = B,
    base: int = 100,
) -> list[bytes]:
    packets = [tcp(client, server, base, SYN), tcp(server, client, base + 5000, SYN | ACK)]
    for source, target, pieces, at in ((client, server, up, base + 1), (server, client, down, base + 5001)):
        for piece in pieces:
            packets.append(tcp(source, target, at, ACK, piece))
            at += len(piece)
    return packets


def judge(*packets: bytes, needles: Sequence[bytes] = (), dropped: int = 0) -> WireReport:
    return inspect(read_pcap(pcap(*packets)), TUNNEL, needles, dropped)


def test_tls_13_to_the_tunnel_port_is_clean() -> None:
    report = judge(*connection([TLS_UP], [TLS_DOWN]))
    assert report.clean
    assert report.plaintext_bytes == 0
    assert report.tls13_connections == 1
    assert report.encrypted_bytes == len(TLS_UP) + len(TLS_DOWN)


def test_tls_13_over_ipv6_is_clean() -> None:
    assert judge(*connection([TLS_UP], [TLS_DOWN], ("fd77::1", 40000), ("fd77::2", TUNNEL))).clean


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_of_a_capture_file_are_read(order: str) -> None:
    (packet,) = read_pcap(pcap(tcp(A, B, 7, ACK, b"abc"), order=order))
    assert packet.content == Segment(A, B, 7, ACK, b"abc")


def test_plaintext_on_the_tunnel_port_is_counted() -> None:
    report = judge(*connection([b"select 1"], [b"1 row"]))
    assert report.plaintext_bytes >= len(b"select 1") + len(b"1 row")
    assert report.tls13_connections == 0


def test_plaintext_after_good_records_is_counted_from_where_it_begins() -> None:
    report = judge(*connection([TLS_UP + b"select 1"], [TLS_DOWN]))
    assert report.plaintext_bytes == len(b"select 1")


def test_plaintext_on_another_port_is_counted() -> None:
    report = judge(*connection([b"select 1"], [b"1 row"], server=("10.77.0.2", 5432)))
    assert report.plaintext_bytes == len(b"select 1") + len(b"1 row")
    assert report.foreign == 4


def test_an_empty_packet_to_another_port_is_a_problem_too() -> None:
    report = judge(tcp(A, ("10.77.0.2", 5432), 1, SYN))
    assert (report.foreign, report.plaintext_bytes, report.clean) == (1, 0, False)


def test_good_tls_on_another_port_is_still_foreign() -> None:
    assert not judge(*connection([TLS_UP], [TLS_DOWN], server=("10.77.0.2", 443))).clean


@pytest.mark.parametrize("version", [None, 0x0303])
def test_a_server_that_chose_tls_12_is_flagged(version: int | None) -> None:
    down = server_hello(version) + record(23, bytes(300))
    report = judge(*connection([TLS_UP], [down]))
    assert report.tls13_connections == 0
    assert report.plaintext_bytes == len(TLS_UP) + len(down)
    assert "0x0303, not TLS 1.3" in report.problems[0]


@given(st.lists(st.integers(0, len(TLS_UP)), max_size=6), st.randoms(), st.integers(0, (1 << 32) - 1))
def test_segments_may_be_split_anywhere_and_shuffled(cuts: list[int], shuffler: random.Random, base: int) -> None:
    edges = [0, *sorted(cuts), len(TLS_UP)]
    pieces = [TLS_UP[low:high] for low, high in pairwise(edges)]
    opening, data = connection(pieces, [TLS_DOWN], base=base)[:2], connection(pieces, [TLS_DOWN], base=base)[2:]
    shuffler.shuffle(data)
    report = judge(*opening, *data)
    assert report.clean, report.problems


def test_a_segment_sent_again_is_fine_and_with_other_contents_is_not() -> None:
    again = tcp(A, B, 101, ACK, TLS_UP[:50])
    assert judge(*connection([TLS_UP], [TLS_DOWN]), again).clean
    assert judge(*connection([TLS_UP], [TLS_DOWN]), tcp(A, B, 101, ACK, b"select 1")).plaintext_bytes == 8


def test_bytes_behind_a_gap_count_as_plaintext() -> None:
    packets = connection([TLS_UP[:50], TLS_UP[50:100], TLS_UP[100:]], [TLS_DOWN])
    del packets[3]
    assert judge(*packets).plaintext_bytes >= len(TLS_UP) - 100


def test_a_connection_older_than_the_capture_cannot_be_judged_and_counts_as_plaintext() -> None:
    report = judge(tcp(A, B, 700, ACK, record(23, bytes(10))))
    assert report.plaintext_bytes == 15


def test_a_reused_port_begins_another_connection() -> None:
    refused = [tcp(A, B, 9, SYN), tcp(B, A, 0, ACK | 4)]
    first, second = connection([TLS_UP], [TLS_DOWN]), connection([TLS_UP], [TLS_DOWN], base=70000)
    report = judge(*first, *refused, *second)
    assert report.clean, report.problems
    assert report.tls13_connections == 2


def test_connections_cut_off_early_are_clean() -> None:
    assert judge(tcp(A, B, 1, SYN), tcp(B, A, 0, ACK | 4)).clean
    assert judge(*connection([client_hello()[:40]], [])).clean
    assert judge(*connection([TLS_UP[:-20]], [TLS_DOWN[:-1]])).clean


def test_application_data_without_a_server_hello_is_flagged() -> None:
    assert not judge(*connection([TLS_UP], [])).clean
    assert not judge(*connection([TLS_UP], [record(23, bytes(5))])).clean


def test_a_record_that_lies_about_its_length_is_no_tls() -> None:
    report = judge(*connection([client_hello() + struct.pack("!BHH", 23, 0x0303, 20000) + bytes(20000)], [TLS_DOWN]))
    assert report.plaintext_bytes == 20005


def test_needles_are_found_in_packets_and_across_them() -> None:
    up = client_hello() + record(23, b"....4000001234567899....")
    assert judge(*connection([up], [TLS_DOWN]), needles=[b"4000001234567899", b"absent"]).needles == [
        b"4000001234567899"
    ]
    middle = up.index(b"4000") + 6
    report = judge(*connection([up[:middle], up[middle:]], [TLS_DOWN]), needles=[b"4000001234567899"])
    assert report.needles
    assert not report.clean


def test_housekeeping_is_fine_and_other_protocols_are_not() -> None:
    arp, icmp6 = ethernet(0x0806, bytes(28)), ip("fd77::1", "fd77::2", 58, bytes(24))
    assert judge(arp, icmp6).clean
    assert judge(ip("10.77.0.1", "10.77.0.2", 17, bytes(30))).plaintext_bytes == 30
    assert judge(ethernet(0x8100, bytes(50))).plaintext_bytes == 64


def test_ipv6_extension_headers_do_not_hide_tcp() -> None:
    hidden = tcp(("fd77::1", 1), ("fd77::2", 5432), 5, ACK, b"select 1")[54:]
    report = judge(ip("fd77::1", "fd77::2", 0, bytes([6, 0]) + bytes(6) + hidden))
    assert report.plaintext_bytes == len(b"select 1")


def test_fragments_and_cut_packets_count_as_plaintext() -> None:
    fragment = bytearray(ip("10.77.0.1", "10.77.0.2", 6, bytes(40)))
    fragment[14 + 6] = 0x20  # more fragments follow
    assert judge(bytes(fragment)).plaintext_bytes == 60
    raw = tcp(A, B, 1, ACK, b"abc")
    short = pcap() + struct.pack("<IIII", 1, 0, 20, len(raw)) + raw[:20]
    assert [packet.content for packet in read_pcap(short)] == [Other("cut short", len(raw))]


def test_a_capture_that_lost_packets_proves_nothing() -> None:
    assert not judge(*connection([TLS_UP], [TLS_DOWN]), dropped=1).clean


def test_a_file_cut_in_its_last_packet_gives_the_others() -> None:
    data = pcap(*connection([TLS_UP], [TLS_DOWN]))
    assert len(read_pcap(data[:-3])) == 3


@given(st.lists(st.binary(max_size=120), max_size=8))
def test_garbage_never_crashes_the_judge(packets: list[bytes]) -> None:
    judge(*packets)


def test_ethernet_padding_is_not_payload() -> None:
    (packet,) = read_pcap(pcap(tcp(A, B, 1, ACK) + bytes(6)))
    assert packet.content == Segment(A, B, 1, ACK, b"")


def test_no_pcap_is_refused() -> None:
    with pytest.raises(ValueError, match="not a pcap"):
        read_pcap(b"select 1")


def test_a_syn_with_data_keeps_its_place() -> None:
    (found,) = reassemble([Segment(A, B, 100, SYN, b"ab"), Segment(A, B, 103, ACK, b"cd")])
    assert (found.client.data, found.client.unplaced) == (b"abcd", 0)
