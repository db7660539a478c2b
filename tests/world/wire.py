"""What crossed the wire (pure): nothing but TLS 1.3 to and from the tunnel port, or else how many bytes were not.

Whatever cannot be judged counts as plaintext: a proof must not have holes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.world import tls
from tests.world.pcap import Other, Packet, Segment
from tests.world.streams import Stream, reassemble


@dataclass(slots=True)
class WireReport:
    """`foreign`: TCP packets to neither end's tunnel port, with or without payload. `needles`: those that were found.
    `problems`: a sentence for each reason why this is not a clean wire."""

    packets: int = 0
    dropped: int = 0
    foreign: int = 0
    tls13_connections: int = 0
    encrypted_bytes: int = 0
    plaintext_bytes: int = 0
    needles: list[bytes] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.problems


def inspect(
    packets: Iterable[Packet], tunnel_port: int, needles: Sequence[bytes] = (), dropped: int = 0
) -> WireReport:
    packets = list(packets)
    report = WireReport(packets=len(packets), dropped=dropped)
    if dropped:
        report.problems.append(f"the capture lost {dropped} packets; repeat it on a quieter machine")
    for packet in packets:
        _check_packet(report, packet, tunnel_port)
    segments = [packet.content for packet in packets if isinstance(packet.content, Segment)]
    connections = reassemble(segments)
    for connection in connections:
        if tunnel_port in (connection.client.source[1], connection.server.source[1]):
            _check_connection(report, connection.client, connection.server)
    streams = [stream.data for connection in connections for stream in (connection.client, connection.server)]
    _search(report, [packet.raw for packet in packets] + streams, needles)
    return report


def _check_packet(report: WireReport, packet: Packet, tunnel_port: int) -> None:
    content = packet.content
    if isinstance(content, Other):
        if not content.housekeeping:
            _plaintext(report, content.size, f"{content.what} packet")
    elif tunnel_port not in (content.source[1], content.target[1]):
        report.foreign += 1
        # Even an empty packet is one too many: the kernel tried to go around the tunnel.
        _plaintext(report, len(content.payload), f"TCP {_show(content.source)} to {_show(content.target)}")


def _check_connection(report: WireReport, client: Stream, server: Stream) -> None:
    sent, answered = _check_stream(report, client), _check_stream(report, server)
    if sent.kinds and not tls.is_client_hello(sent.hello):
        _plaintext(report, len(client.data), f"no ClientHello from {_show(client.source)}")
        return
    version = tls.server_version(answered.hello)
    if version == tls.TLS13:
        report.tls13_connections += 1
        report.encrypted_bytes += len(client.data) + len(server.data) - sent.strange - answered.strange
    elif answered.kinds or any(kind == tls.APPLICATION_DATA for kind in sent.kinds):
        # Without a ServerHello there may be the other side's hello, cut off, and nothing else.
        chosen = "nothing" if version is None else f"version 0x{version:04x}"
        what = f"{_show(server.source)} chose {chosen}, not TLS 1.3,"
        _plaintext(report, len(client.data) + len(server.data), what)


def _check_stream(report: WireReport, stream: Stream) -> tls.Records:
    if stream.unplaced:
        _plaintext(report, stream.unplaced, f"from {_show(stream.source)} without a place in its stream:")
    records = tls.read_records(stream.data)
    if records.strange:
        _plaintext(report, records.strange, f"from {_show(stream.source)}, no TLS:")
    return records


def _search(report: WireReport, haystacks: Sequence[bytes], needles: Sequence[bytes]) -> None:
    """In packets as they were and in streams, where a needle may lie across two packets."""
    report.needles = [needle for needle in needles if any(needle in hay for hay in haystacks)]
    report.problems += [f"found on the wire: {needle!r}" for needle in report.needles]


def _plaintext(report: WireReport, size: int, what: str) -> None:
    report.plaintext_bytes += size
    report.problems.append(f"{what} {size} bytes")


def _show(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
