"""The one record of a flow, however it ends. Log line, metrics and flow list all come from these values. Pure."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any


class Event(enum.StrEnum):
    OPEN = "open"  # still open; repeated while it lives
    CLOSE = "close"
    DENY = "deny"  # never carried a byte of the application
    REJECT = "reject"  # a peer on the tunnel port that never became a stream


class Side(enum.StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Path(enum.StrEnum):
    """How the bytes go: through the proxies, or from one application of a host to another of the same host."""

    TUNNEL = "tunnel"
    DIRECT = "direct"
    NONE = ""  # refused before there was a way


@dataclass(frozen=True, slots=True)
class Tls:
    version: str
    cipher: str
    peer_serial: str


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Empty text means not known (yet). `connection` is the same on both hosts. Bytes are the application's own:
    `bytes_sent` from client to server. `added_ms` is this host's share of the latency; `rtt_us` the kernel's smoothed
    round-trip time of the tunnel, or of the direct
    connection (tcp_info.tcpi_rtt)."""

    event: Event
    time: float
    host: str
    side: Side
    connection: str = ""
    source: str = ""
    destination: str = ""
    service: str = ""
    verdict: str = ""
    rule: str = ""
    reason: str = ""
    client: str = ""
    server: str = ""
    tls: Tls | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    connect_ms: float | None = None
    duration_ms: float | None = None
    added_ms: Percentiles | None = None
    rtt_us: int | None = None
    close_reason: str = ""
    path: Path = Path.TUNNEL
    # Who was refused inside connect(); the kernel tells these only there.
    command: str = ""
    pid: int | None = None
    uid: int | None = None


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The fields of a log line; the time as RFC 3339 in UTC with microseconds."""
    fields = asdict(outcome)
    fields["time"] = datetime.fromtimestamp(outcome.time, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return fields


def socket_text(address: object, port: int) -> str:
    text = str(address)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
