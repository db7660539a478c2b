"""bpf/steer.h and bpf/address.h, compiled with plain `cc` and asked through ctypes."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import records
from agent.hooks.source import bpf_directory
from agent.records import Exit, VerdictKind

_WRAPPER = """
#include <linux/types.h>
#include "steer.h"
#include "address.h"
#include "ending.h"
unsigned long long sent(unsigned long long acked, int state, unsigned una, unsigned nxt)
{ return bytes_sent(acked, state, una, nxt); }
unsigned long long received(unsigned long long count, int state, unsigned nxt, int fin, unsigned fin_end)
{ struct flow flow = {.fin = fin, .fin_end = fin_end}; return bytes_received(count, state, nxt, &flow); }
int steer_case(const struct facts *facts) { struct steering s = steer(facts); return s.act << 8 | s.exit; }
int own_socket(const struct facts *facts) { return is_own_socket(facts); }
int mapped(const struct address *a) { return !!is_mapped(a); }
int loopback(const struct address *a) { return !!is_loopback(a); }
int known(const struct address *a) { return !!is_known(a); }
int unspecified(const struct address *a) { return !!is_unspecified(a); }
void make_v4(struct address *a, const void *ip) { load_v4(a, *(const __u32 *)ip); }
void make_place(struct tuple *place, __u64 cookie) { load_place(place, cookie); }
"""


class Facts(ctypes.Structure):
    """struct facts."""

    _fields_ = [
        (name, ctypes.c_uint8)
        for name in ("configured", "exempt", "own_netns", "tcp", "to_capture", "protected", "verdict", "local", "fresh")
    ]


USUAL = {"configured": 1, "own_netns": 1, "tcp": 1, "protected": 1}
LOCAL = {"verdict": VerdictKind.ALLOW, "local": 1, "fresh": 1}
PASS, CAPTURE, EPERM, ECONNREFUSED, DIRECT = range(5)

CASES = [
    ("a protected connect is captured", {}, CAPTURE, Exit.CAPTURED),
    ("an allowed one is captured", {"verdict": VerdictKind.ALLOW}, CAPTURE, Exit.CAPTURED),
    ("an allowed one of this host goes directly", LOCAL, DIRECT, Exit.DIRECT),
    ("one that nobody verified lately is captured", LOCAL | {"fresh": 0}, CAPTURE, Exit.CAPTURED),
    ("one of another host is captured", LOCAL | {"local": 0}, CAPTURE, Exit.CAPTURED),
    ("where the kernel does not know, the proxy is asked", LOCAL | {"verdict": 0}, CAPTURE, Exit.CAPTURED),
    ("a denied one of this host is refused", LOCAL | {"verdict": VerdictKind.DENY}, EPERM, Exit.DENIED),
    ("an unavailable one of this host is refused", LOCAL | {"verdict": 3}, ECONNREFUSED, Exit.UNAVAILABLE),
    ("an unknown verdict never goes directly", LOCAL | {"verdict": 77}, CAPTURE, Exit.CAPTURED),
    ("UDP to this host is not counted as a flow", LOCAL | {"tcp": 0}, PASS, Exit.NOT_TCP),
    ("the agent delivers as ever", LOCAL | {"exempt": 1}, PASS, Exit.EXEMPT),
    ("a denied one is refused", {"verdict": VerdictKind.DENY}, EPERM, Exit.DENIED),
    ("one without endpoints is refused", {"verdict": VerdictKind.UNAVAILABLE}, ECONNREFUSED, Exit.UNAVAILABLE),
    ("an unprotected one passes", {"protected": 0}, PASS, Exit.UNPROTECTED),
    ("UDP passes", {"tcp": 0}, PASS, Exit.NOT_TCP),
    ("the agent passes", {"exempt": 1}, PASS, Exit.EXEMPT),
    ("the agent passes although denied", {"exempt": 1, "verdict": VerdictKind.DENY}, PASS, Exit.EXEMPT),
    ("the agent may dial its own listener", {"exempt": 1, "to_capture": 1}, PASS, Exit.EXEMPT),
    ("another namespace passes", {"own_netns": 0}, PASS, Exit.OTHER_NETNS),
    ("another namespace's capture port is its own", {"own_netns": 0, "to_capture": 1}, PASS, Exit.OTHER_NETNS),
    ("the capture port is refused", {"to_capture": 1, "protected": 0}, EPERM, Exit.LOOP),
    ("the capture port is refused even if protected", {"to_capture": 1}, EPERM, Exit.LOOP),
    ("nothing is captured before configuration", {"configured": 0}, PASS, Exit.UNPROTECTED),
    ("nothing is denied before configuration", {"configured": 0, "verdict": 2}, PASS, Exit.UNPROTECTED),
    ("an unknown verdict captures", {"verdict": 77}, CAPTURE, Exit.CAPTURED),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("steer")
    source, built = directory / "wrapper.c", directory / "steer.so"
    source.write_text(_WRAPPER, encoding="utf-8")
    compiler = shutil.which("cc")
    assert compiler, "cc is missing; ./run install brings it"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{bpf_directory()}"]
    command = [compiler, *flags, "-o", str(built), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


def steer(library: ctypes.CDLL, **facts: int) -> tuple[int, int]:
    answer = library.steer_case(ctypes.byref(Facts(**facts)))
    return answer >> 8, answer & 0xFF


@pytest.mark.parametrize(("changed", "act", "exit_"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_steering(library: ctypes.CDLL, changed: dict[str, int], act: int, exit_: Exit) -> None:
    assert steer(library, **(USUAL | changed)) == (act, exit_)


def test_over_all_facts_only_the_named_ways_lead_past_the_proxy(library: ctypes.CDLL) -> None:
    names = ("configured", "exempt", "own_netns", "tcp", "to_capture", "protected", "local", "fresh")
    for values in itertools.product((0, 1), repeat=len(names)):
        facts = dict(zip(names, values, strict=True))
        for verdict in VerdictKind:
            act, _exit = steer(library, **facts, verdict=verdict)
            ours = facts["configured"] and not facts["exempt"] and facts["own_netns"]
            if ours and facts["protected"] and facts["tcp"]:
                assert act != PASS, facts
                assert (act == DIRECT) <= bool(verdict == VerdictKind.ALLOW and facts["local"] and facts["fresh"])
            if not ours:
                assert act == PASS, facts


def test_the_loop_guard_looks_at_nothing_but_the_agent_itself(library: ctypes.CDLL) -> None:
    for field in [name for name, *_rest in Facts._fields_]:
        assert library.own_socket(ctypes.byref(Facts(**{field: 1}))) == (field == "exempt")


@pytest.mark.parametrize(
    ("text", "mapped", "loopback", "unspecified"),
    [
        ("127.0.0.1", 1, 1, 0),
        ("127.255.0.9", 1, 1, 0),
        ("128.0.0.1", 1, 0, 0),
        ("10.0.0.0", 1, 0, 0),
        ("0.0.0.0", 1, 0, 1),
        ("::", 0, 0, 1),
        ("::1", 0, 1, 0),
        ("::2", 0, 0, 0),
        ("::127.0.0.1", 0, 0, 0),
        ("::fffe:127.0.0.1", 0, 0, 0),
        ("fd99::", 0, 0, 0),
        ("fd99::1", 0, 0, 0),
        ("::1:0:0", 0, 0, 0),
        ("64:ff9b::7f00:1", 0, 0, 0),
    ],
)
def test_kinds_of_addresses(library: ctypes.CDLL, text: str, mapped: int, loopback: int, unspecified: int) -> None:
    address = records.pack_address(ip_address(text))
    found = library.mapped(address), library.loopback(address), library.unspecified(address)
    assert found == (mapped, loopback, unspecified)
    assert library.known(address) == any(address)


def test_an_ipv4_address_is_loaded_as_records_packs_it(library: ctypes.CDLL) -> None:
    address, loaded = ip_address("192.0.2.1"), ctypes.create_string_buffer(16)
    library.make_v4(loaded, address.packed)
    assert loaded.raw == records.pack_address(address)


ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 2, 4, 5, 8, 9, 11


@pytest.mark.parametrize(
    ("acked", "state", "una", "nxt", "bytes_"),
    [
        (0, SYN_SENT, 5, 6, 0),
        (1, ESTABLISHED, 6, 6, 0),
        (201, ESTABLISHED, 6, 6, 200),
        (201, CLOSE_WAIT, 6, 6, 200),
        (201, FIN_WAIT1, 6, 7, 200),
        (202, FIN_WAIT2, 7, 7, 200),
        (202, LAST_ACK, 7, 7, 200),
        (201, LAST_ACK, 6, 7, 200),
        (202, CLOSING, 7, 7, 200),
        (201, CLOSING, 6, 7, 200),
        (1, LAST_ACK, 7, 7, 0),
    ],
)
def test_acknowledged_bytes_without_syn_and_fin(
    library: ctypes.CDLL, acked: int, state: int, una: int, nxt: int, bytes_: int
) -> None:
    library.sent.restype = ctypes.c_uint64
    assert library.sent(ctypes.c_uint64(acked), state, una, nxt) == bytes_


@pytest.mark.parametrize(
    ("count", "state", "nxt", "fin", "fin_end", "bytes_"),
    [
        (0, SYN_SENT, 0, 0, 0, 0),
        (300, ESTABLISHED, 6, 0, 0, 300),
        (301, CLOSE_WAIT, 6, 0, 0, 300),
        (301, LAST_ACK, 6, 0, 0, 300),
        (301, CLOSING, 6, 1, 6, 300),
        (301, FIN_WAIT2, 6, 1, 6, 300),
        (300, FIN_WAIT2, 6, 0, 0, 300),
        (300, FIN_WAIT2, 0, 0, 0, 300),
        (300, FIN_WAIT2, 6, 1, 9, 300),
        (300, FIN_WAIT1, 6, 0, 0, 300),
        (0, LAST_ACK, 6, 0, 0, 0),
    ],
)
def test_received_bytes_without_the_servers_fin(
    library: ctypes.CDLL, count: int, state: int, nxt: int, fin: int, fin_end: int, bytes_: int
) -> None:
    library.received.restype = ctypes.c_uint64
    assert library.received(ctypes.c_uint64(count), state, nxt, fin, fin_end) == bytes_


def test_a_reservation_is_in_no_namespace_and_told_apart_by_its_cookie(library: ctypes.CDLL) -> None:
    place = ctypes.create_string_buffer(b"\xff" * records.TUPLE.size, records.TUPLE.size)
    library.make_place(place, ctypes.c_uint64(0x1122334455667788))
    netns, source, *rest = records.TUPLE.unpack(place.raw)
    assert (netns, source[:8], source[8:]) == (0, (0x1122334455667788).to_bytes(8, "little"), bytes(8))
    assert not any(map(bool, map(int, rest[1:])))


def test_flow_h_is_the_only_place_of_a_layout() -> None:
    """Maps are typed by flow.h alone: a struct anywhere else would escape the layout test."""
    allowed = {"flow.h", "steer.h"}  # steer.h: what never leaves a program
    for path in bpf_directory().glob("*.[ch]"):
        text = Path(path).read_text(encoding="utf-8")
        made = [line for line in text.splitlines() if line.startswith("struct ") and line.rstrip().endswith("{")]
        outside = [line for line in made if "_table_t" not in line]
        assert path.name in allowed or not outside, (path.name, outside)
