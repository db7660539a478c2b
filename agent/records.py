"""The kernel's records as values: bytes in the layout of bpf/flow.h to frozen dataclasses and back. Pure.

tests/host/test_layout.py compares sizes and field offsets with what bcc derives from the C.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address

SCHEMA_VERSION = 2
ANY_UID = 0xFFFFFFFF
CALLER_UNKNOWN = 0
CALLER_NOBODY = 1

FLOW = struct.Struct("=QQQQ16s16sIIIIIIHHBB2x")
SETTINGS = struct.Struct("=QQ16s16sIIH6x")
SERVICE_KEY = struct.Struct("=I2s16s2x")
SERVICE = struct.Struct("=16sIB3x")
LEASE = struct.Struct("=Q")
CALLER_KEY = struct.Struct("=QII")
VERDICT_KEY = struct.Struct("=II")
VERDICT = struct.Struct("=IB3x")
REFUSAL = struct.Struct("=QQ16sIIIIIHH16s")
CLOSING = struct.Struct("=QQQQQQQ16s16sIIIIIIIHHB7x")
TUPLE = struct.Struct("=Q16s16sHHI")


class Role(enum.IntEnum):
    """enum flow_role."""

    CAPTURED = 1
    ACCEPTED = 2
    DELIVERED = 3
    SERVED = 4
    DIRECT = 5
    LISTENER = 6


class VerdictKind(enum.IntEnum):
    """enum verdict_kind."""

    ASK = 0
    ALLOW = 1
    DENY = 2
    UNAVAILABLE = 3


class Exit(enum.IntEnum):
    """enum exit: one counter for each way out of a kernel program."""

    UNPROTECTED = 0
    EXEMPT = 1
    OTHER_NETNS = 2
    NOT_TCP = 3
    CAPTURED = 4
    DENIED = 5
    UNAVAILABLE = 6
    FULL = 7
    LOOP = 8
    EVENT_LOST = 9
    PUBLISHED = 10
    PUBLISH_FAILED = 11
    TAKEN = 12
    WITHDRAWN = 13
    DIRECT = 14
    NO_PROXY = 15


def pack_address(address: Address | None) -> bytes:
    """16 bytes, IPv4 mapped; all zero for None."""
    if address is None:
        return bytes(16)
    if isinstance(address, IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def unpack_address(data: bytes) -> Address | None:
    if data == bytes(16):
        return None
    address = IPv6Address(data)
    return address.ipv4_mapped or address


@dataclass(frozen=True, slots=True)
class Flow:
    """struct flow, without what the kernel notes on direct flows for itself. `started_ns` is CLOCK_BOOTTIME; `source`
    is None when the kernel was not told what to show."""

    cookie: int
    cgroup: int
    started_ns: int
    original: Address
    source: Address | None
    uid: int
    pid: int
    caller: int
    service: int
    original_port: int
    source_port: int
    role: Role


def unpack_flow(data: bytes) -> Flow:
    """ValueError when the role is not one of ours or there is no original destination: never guess."""
    cookie, cgroup, started, _, original, source, uid, pid, caller, service, _, _, port, source_port, role, _ = (
        FLOW.unpack(data)
    )
    dialled = unpack_address(original)
    if dialled is None:
        raise ValueError("a flow without its original destination")
    return Flow(
        cookie,
        cgroup,
        started,
        dialled,
        unpack_address(source),
        uid,
        pid,
        caller,
        service,
        port,
        source_port,
        Role(role),
    )


def pack_flow(flow: Flow) -> bytes:
    return FLOW.pack(
        flow.cookie, flow.cgroup, flow.started_ns, 0, pack_address(flow.original), pack_address(flow.source),
        flow.uid, flow.pid, flow.caller, flow.service, 0, 0, flow.original_port, flow.source_port, flow.role, 0,
    )  # fmt: skip


def delivered(source: Address, source_port: int, original: Address, original_port: int) -> bytes:
    """The note on the socket that dials an application: the client address that the application will see."""
    return pack_flow(Flow(0, 0, 0, original, source, 0, 0, 0, 0, original_port, source_port, Role.DELIVERED))


def listening(original: Address) -> bytes:
    """The mark on a capture listener of ours; bpf/connect.c captures for no other."""
    return pack_flow(Flow(0, 0, 0, original, None, 0, 0, 0, 0, 0, 0, Role.LISTENER))


@dataclass(frozen=True, slots=True)
class Settings:
    """struct settings."""

    netns: int
    exempt_cgroup: int
    exempt_level: int
    capture_v4: Address
    capture_v6: Address
    capture_port: int

    def pack(self) -> bytes:
        return SETTINGS.pack(
            self.netns, self.exempt_cgroup, pack_address(self.capture_v4), pack_address(self.capture_v6),
            self.exempt_level, SCHEMA_VERSION, self.capture_port,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """struct refusal: a connect() the kernel refused. `command` is untrusted text from the process."""

    at_ns: int
    cgroup: int
    original: Address | None
    uid: int
    pid: int
    caller: int
    service: int
    rule: int
    original_port: int
    exit: int
    command: str


def unpack_refusal(data: bytes) -> Refusal:
    at, cgroup, original, uid, pid, caller, service, rule, port, exit_, command = REFUSAL.unpack(data[: REFUSAL.size])
    text = command.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    return Refusal(at, cgroup, unpack_address(original), uid, pid, caller, service, rule, port, exit_, text)


@dataclass(frozen=True, slots=True)
class Closing:
    """struct closing: the end of a direct flow. Times are CLOCK_BOOTTIME; `connected_ns` is 0 when it never was."""

    at_ns: int
    started_ns: int
    connected_ns: int
    cookie: int
    cgroup: int
    bytes_sent: int
    bytes_received: int
    original: Address | None
    source: Address | None
    uid: int
    pid: int
    caller: int
    service: int
    rule: int
    rtt_us: int
    retransmits: int
    original_port: int
    source_port: int
    state: int


def unpack_closing(data: bytes) -> Closing:
    *numbers, original, source, uid, pid, caller, service, rule, rtt, again, port, source_port, state = CLOSING.unpack(
        data[: CLOSING.size]
    )
    at, started, connected, cookie, cgroup, sent, received = numbers
    return Closing(
        at, started, connected, cookie, cgroup, sent, received, unpack_address(original), unpack_address(source),
        uid, pid, caller, service, rule, rtt, again, port, source_port, state,
    )  # fmt: skip


def service_key(address: Address, port: int) -> bytes:
    return SERVICE_KEY.pack(16 + 128, port.to_bytes(2, "big"), pack_address(address))


def service_value(service: int, source: Address | None, local: bool = False) -> bytes:
    return SERVICE.pack(pack_address(source), service, local)


def caller_key(cgroup: int, uid: int = ANY_UID) -> bytes:
    return CALLER_KEY.pack(cgroup, uid, 0)


def verdict_key(caller: int, service: int) -> bytes:
    return VERDICT_KEY.pack(caller, service)


def verdict_value(kind: VerdictKind, rule: int) -> bytes:
    return VERDICT.pack(rule, kind)
