"""The compiled inner loop alone: what it carries, what it leaves to Python, and that nothing is lost in between."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import ssl
import struct
import time
from array import array
from collections.abc import Iterator
from typing import Any, cast

import pytest

from agent.certs.authority import make_intermediate, make_leaf, make_root
from agent.certs.contexts import ServerContexts, client_context, wrap
from agent.proxy import engine as engines
from agent.proxy.latency import AddedLatency
from agent.proxy.link import Link
from agent.proxy.relay import Relay
from agent.tunnel.frames import RECORD_DATA, FrameType, frame
from policy.identity import SpiffeId

DOMAIN = "test.bank"
EOF = frame(FrameType.EOF)


def data(payload: bytes) -> bytes:
    return frame(FrameType.DATA, payload)


class Told:
    """Stands in for the relay and the link: remembers what the engine handed over."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda detail: self.calls.append((name, detail))


def tls_pair() -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """(a's, b's), not blocking, over real TCP."""
    root = make_root(DOMAIN, time.time())
    made = []
    for host, name in (("a", "ledger"), ("b", "core")):
        identity = SpiffeId(DOMAIN, host, name)
        made.append(make_leaf(make_intermediate(root, DOMAIN, host, time.time()), identity, time.time(), 3600))
    near, far = tcp_pair()
    client = wrap(client_context(made[0], root.certificate_pem), near, False, made[1].identity.server_name)
    server = wrap(ServerContexts([made[1]], root.certificate_pem).base, far, True)
    left = [client, server]
    while left:
        for side in list(left):
            try:
                side.do_handshake()
                left.remove(side)
            except ssl.SSLWantReadError:
                pass
    return client, server


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Rig:
    """One lane: `app` and `peer` are the far ends of its application's socket and of its tunnel."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        made = engines.make(self.epoll.fileno())
        if made is None:
            pytest.fail("the engine is not built; ./run install builds it")
        self.engine = made
        self.tls, self.peer = tls_pair()
        self.near, self.app = tcp_pair()
        self.told = Told()
        self.moved, self.latency = array("q", (0, 0)), AddedLatency()
        lane = engines.lane(self.engine, self.tls)
        assert lane is not None
        self.lane = lane
        for fd in (self.near.fileno(), self.tls.fileno()):
            self.epoll.register(fd, select.EPOLLIN)
        self.begin()

    def begin(self) -> None:
        told = cast(Any, self.told)
        self.lane.begin(self.near.fileno(), told, told, self.moved, self.latency.cells, True)
        self.lane.sends = self.lane.receives = True

    def turn(self, seconds: float = 0.05) -> list[tuple[int, int]]:
        """One wait; what is handed over goes to `told`, ordinary events are returned."""
        ordinary = []
        for fd, task, detail in self.engine.wait(seconds):
            if task is not None:
                task(detail)
            else:
                ordinary.append((fd, detail))
        return ordinary

    def heard(self) -> bytes:
        """Everything that the tunnel's other end can read now."""
        return drain(self.peer.recv, ssl.SSLWantReadError)

    def close(self) -> None:
        self.lane.end()
        for sock in (self.tls, self.peer, self.near, self.app):
            sock.close()
        self.epoll.close()


def drain(read: Any, nothing: type[Exception]) -> bytes:
    got = b""
    try:
        while more := read(1 << 16):
            got += more
    except nothing:
        pass
    return got


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_bytes_of_the_application_become_one_frame(rig: Rig) -> None:
    rig.app.send(b"question")
    assert rig.turn() == []
    assert rig.heard() == data(b"question")
    assert list(rig.moved) == [8, 0]
    assert rig.told.calls == []


def test_a_frame_becomes_bytes_of_the_application(rig: Rig) -> None:
    rig.peer.send(data(b"answer"))
    assert rig.turn() == []
    assert rig.app.recv(100) == b"answer"
    assert list(rig.moved) == [0, 6]
    assert rig.told.calls == []


def test_an_exchange_is_counted_as_python_counts_it(rig: Rig) -> None:
    for _ in range(3):
        rig.app.send(b"question")
        rig.turn()
        rig.peer.send(data(b"answer"))
        rig.turn()
    rig.peer.send(data(b"more of the same answer"))
    rig.turn()
    assert sum(rig.latency.counts) == 3
    assert rig.latency.percentiles() is not None


def test_one_large_read_fills_records_that_can_be_read_one_by_one(rig: Rig) -> None:
    text = random.Random(1).randbytes(3 * RECORD_DATA + 77)
    rig.app.send(text)
    time.sleep(0.02)
    rig.turn()
    parts = [text[at : at + RECORD_DATA] for at in range(0, len(text), RECORD_DATA)]
    assert rig.heard() == b"".join(map(data, parts))
    assert rig.moved[0] == len(text)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_frame_cut_anywhere_is_left_to_python_whole(rig: Rig, cut: int) -> None:
    whole = data(b"payload!")
    rig.peer.send(whole[:cut])
    time.sleep(0.005)
    assert rig.turn() == []
    assert rig.told.calls == [("take", whole[:cut])]


def test_whole_frames_before_another_one_are_carried(rig: Rig) -> None:
    rig.peer.send(data(b"one") + data(b"two") + EOF + b"\x08")
    assert rig.turn() == []
    assert rig.app.recv(100) == b"onetwo"
    assert rig.told.calls == [("take", EOF + b"\x08")]
    assert rig.moved[1] == 6


@pytest.mark.parametrize("header", [b"\x04\x00\x00\x00", b"\x04\x01\x00\x01", b"\x04\xff\xff\xff", b"\x03\x00\x00\x04"])
def test_a_header_that_is_no_data_is_left_to_the_decoder(rig: Rig, header: bytes) -> None:
    rig.peer.send(header + b"abcd")
    rig.turn()
    assert rig.told.calls == [("take", header + b"abcd")]
    assert list(rig.moved) == [0, 0]


def test_the_end_of_the_application_is_told(rig: Rig) -> None:
    rig.app.shutdown(socket.SHUT_WR)
    rig.turn()
    assert rig.told.calls == [("app_ended", 0)]


def test_bytes_before_the_end_of_the_application_go_first(rig: Rig) -> None:
    rig.app.send(b"last words")
    rig.app.shutdown(socket.SHUT_WR)
    rig.turn()
    assert rig.heard() == data(b"last words")
    assert rig.told.calls == [("app_ended", 0)]


def test_the_errno_of_a_reset_is_told_because_reading_consumes_it(rig: Rig) -> None:
    rig.app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rig.app.close()
    rig.turn()
    assert rig.told.calls == [("app_lost", errno.ECONNRESET)]


def test_a_reset_met_while_writing_keeps_what_follows(rig: Rig) -> None:
    rig.epoll.modify(rig.near.fileno(), 0)
    rig.lane.app_in = False
    rig.app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rig.app.close()
    rig.peer.send(data(b"too late") + EOF)
    assert [mask & select.EPOLLERR for fd, mask in rig.turn() if fd == rig.near.fileno()] == [select.EPOLLERR]
    assert [name for name, _ in rig.told.calls] == ["app_lost", "take"]
    assert rig.told.calls[1] == ("take", EOF)


@pytest.mark.parametrize("orderly", [True, False])
def test_the_end_of_the_tunnel_is_told(rig: Rig, orderly: bool) -> None:
    if orderly:
        with pytest.raises(ssl.SSLWantReadError):
            rig.peer.unwrap()
    else:
        socket.socket(fileno=socket.dup(rig.peer.fileno())).shutdown(socket.SHUT_RDWR)
    rig.turn()
    expected = "the peer closed the tunnel" if orderly else "tls: UNEXPECTED_EOF_WHILE_READING"
    assert rig.told.calls == [("close", expected)]


def test_what_is_no_tls_ends_the_tunnel_and_leaves_no_error_behind(rig: Rig) -> None:
    socket.socket(fileno=socket.dup(rig.peer.fileno())).send(b"\x17\x03\x03\x00\x20" + bytes(32))
    rig.turn()
    [(name, text)] = rig.told.calls
    assert name == "close"
    assert text.startswith("tls: ")
    other = Rig()
    other.peer.send(data(b"unharmed"))
    other.turn()
    assert other.told.calls == []
    other.close()


def test_a_full_application_leaves_the_rest_to_python_and_not_a_byte_is_missing(rig: Rig) -> None:
    rig.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    text = random.Random(2).randbytes(3 << 20)
    sent, parts = 0, []
    while not rig.told.calls:
        if sent < len(text):
            part = text[sent : sent + RECORD_DATA]
            try:
                rig.peer.send(data(part))
                sent += len(part)
            except ssl.SSLWantWriteError:
                pytest.fail("the tunnel filled up before the application did")
        rig.turn(0)
    names = [name for name, _ in rig.told.calls]
    assert names == ["app_full", "take"]
    parts.append(drain(rig.app.recv, BlockingIOError))
    time.sleep(0.02)
    parts.append(drain(rig.app.recv, BlockingIOError))
    parts.append(rig.told.calls[0][1])
    got = b"".join(parts)
    assert got == text[: len(got)]
    assert rig.moved[1] == len(got)


def test_a_full_tunnel_leaves_the_frame_to_python_and_the_same_frame_goes_out_later(rig: Rig) -> None:
    text = random.Random(3).randbytes(32 << 20)
    sent = 0
    while not rig.told.calls:
        with contextlib.suppress(BlockingIOError):
            sent += rig.app.send(text[sent : sent + 65536])
        rig.turn(0)
    [(name, held)] = rig.told.calls
    assert name == "tunnel_full"
    got = b""
    while True:  # as Link._flush does: the same bytes from another place, until OpenSSL has them
        got += rig.heard()
        try:
            rig.tls.write(held)
            break
        except ssl.SSLWantWriteError:
            continue
    time.sleep(0.02)
    got += rig.heard()
    payload = unframed(got)
    assert payload == text[: len(payload)]
    assert rig.moved[0] == len(payload)


def unframed(got: bytes) -> bytes:
    parts = []
    while got:
        kind, size = got[0], int.from_bytes(got[1:4], "big")
        assert kind == FrameType.DATA
        parts.append(got[4 : 4 + size])
        got = got[4 + size :]
    return b"".join(parts)


@pytest.mark.parametrize("flag", ["app_in", "sends"])
def test_python_gets_the_applications_events_while_a_flag_is_down(rig: Rig, flag: str) -> None:
    setattr(rig.lane, flag, False)
    rig.app.send(b"not yours")
    assert rig.turn() == [(rig.near.fileno(), select.EPOLLIN)]
    assert rig.near.recv(100) == b"not yours"


@pytest.mark.parametrize("flag", ["app_out", "receives"])
def test_python_gets_the_tunnels_events_while_a_flag_is_down(rig: Rig, flag: str) -> None:
    setattr(rig.lane, flag, False)
    rig.peer.send(data(b"not yours"))
    assert rig.turn() == [(rig.tls.fileno(), select.EPOLLIN)]
    assert rig.tls.recv(100) == data(b"not yours")


def test_records_that_openssl_read_ahead_are_never_stranded(rig: Rig) -> None:
    """More of them than one wake-up may read, and no event will come for those inside OpenSSL."""
    for _ in range(200):
        rig.peer.send(data(b"x"))
    time.sleep(0.05)
    for _ in range(40):
        rig.turn(0)
    assert rig.moved[1] == 200
    assert not rig.lane.waiting()


def test_after_its_end_a_lane_touches_nothing(rig: Rig) -> None:
    rig.lane.end()
    rig.app.send(b"for python")
    rig.peer.send(data(b"also"))
    time.sleep(0.02)
    assert sorted(rig.turn()) == sorted([(rig.near.fileno(), select.EPOLLIN), (rig.tls.fileno(), select.EPOLLIN)])
    rig.begin()
    assert rig.turn() == []
    assert rig.app.recv(10) == b"also"


def test_forgetting_either_descriptor_ends_the_lane(rig: Rig) -> None:
    for fd in (rig.near.fileno(), rig.tls.fileno()):
        rig.engine.forget(fd)
        rig.peer.send(data(b"z"))
        assert rig.turn() == [(rig.tls.fileno(), select.EPOLLIN)]
        assert rig.tls.recv(10) == data(b"z")
        rig.begin()
    rig.engine.forget(100_000)
    rig.engine.forget(-1)


def test_a_descriptor_has_one_lane(rig: Rig) -> None:
    with pytest.raises(ValueError, match="cannot carry"):
        rig.begin()
    other = Rig()
    with pytest.raises(ValueError, match="cannot carry"):
        other.begin()
    other.close()


def test_tables_of_another_size_are_refused(rig: Rig) -> None:
    rig.lane.end()
    told = cast(Any, rig.told)
    for moved, costs in ((array("q", (0,)), rig.latency.cells), (rig.moved, array("q", (0, 0)))):
        with pytest.raises(ValueError, match="another size"):
            rig.lane.begin(rig.near.fileno(), told, told, moved, costs, True)
    rig.begin()


def test_only_the_tls_object_of_that_very_socket_is_taken(rig: Rig) -> None:
    inner = getattr(rig.tls, "_sslobj", None)
    wrong: list[tuple[Any, Any, int]] = [
        (rig.peer, inner, rig.tls.fileno()),
        (rig.tls, inner, rig.peer.fileno()),
        (rig.tls, inner, -1),
        (rig.tls, None, rig.tls.fileno()),
        (rig.tls, object(), rig.tls.fileno()),
        (rig.tls, rig.tls, rig.tls.fileno()),
    ]
    for given in wrong:
        with pytest.raises(ValueError, match="not laid out as known"):
            rig.engine.lane(*given)


def test_an_unknown_python_or_openssl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ssl, "OPENSSL_VERSION", "OpenSSL 9.9.9")
        assert engines.make(0) is None
    with monkeypatch.context() as patch:
        patch.setattr(engines, "KNOWN", ())
        assert engines.make(0) is None
    monkeypatch.setenv(engines.OFF, "python")
    assert engines.make(0) is None


def test_the_stand_in_has_every_method_the_engine_calls() -> None:
    for owner, names in ((Relay, ("app_ended", "app_lost", "app_full", "tunnel_full")), (Link, ("take", "close"))):
        assert all(callable(getattr(owner, name)) for name in names)
