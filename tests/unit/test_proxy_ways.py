"""The compiled way and the Python way beside each other and beside a direct connection: nobody can tell them apart."""

from __future__ import annotations

import contextlib
import itertools
import random
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.unit.proxy_pair import WAYS, Pair, running, wait_until

MIXED = list(itertools.product(WAYS, repeat=2))


@pytest.fixture(params=MIXED, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with running(ways=request.param) as made:
        yield made


def abort(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_the_ways_are_what_the_test_asked_for(pair: Pair, request: pytest.FixtureRequest) -> None:
    way = request.node.callspec.params["pair"]
    assert [proxy.worker._loop.compiled for proxy in (pair.a, pair.b)] == [name == "compiled" for name in way]


def direct() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def read_to_the_end(sock: socket.socket) -> bytes:
    got = bytearray()
    while more := sock.recv(1 << 18):
        got += more
    return bytes(got)


Seen = tuple[bytes, bytes]


def talk(client: socket.socket, server: socket.socket, seed: int, messages: int) -> Seen:
    """Both sides send messages of random size at random times and end their direction at some point; what each side
    has read until the other's end."""
    chance = random.Random(seed)
    plan = {}
    for sock in (client, server):
        count = chance.randrange(messages // 2, messages)
        sizes = [chance.choice((1, 2, 7, 200, 1400, 16379, 16380, 16381, 70000)) for _ in range(count)]
        if messages > 500:
            sizes = [min(size, 200) for size in sizes]
        plan[sock] = b"".join(bytes([number % 251]) * size for number, size in enumerate(sizes)), sizes
        sock.setblocking(False)
    sent = {client: 0, server: 0}
    cuts = {sock: list(itertools.accumulate(sizes)) for sock, (_, sizes) in plan.items()}
    seen: dict[socket.socket, bytearray] = {client: bytearray(), server: bytearray()}
    open_ends = {client, server}
    poll = select.poll()
    for sock in (client, server):
        poll.register(sock, select.POLLIN | select.POLLOUT)
    by_fd = {sock.fileno(): sock for sock in (client, server)}
    writing = {client, server}
    deadline = time.monotonic() + 60
    while open_ends:
        assert time.monotonic() < deadline, (seed, sent, {k.fileno(): len(v) for k, v in seen.items()})
        for fd, mask in poll.poll(1000):
            sock = by_fd[fd]
            if mask & select.POLLIN and sock in open_ends and chance.random() < 0.9:
                more = sock.recv(chance.choice((1, 100, 65536)) if messages <= 500 else 65536)
                seen[sock] += more
                if not more:
                    open_ends.discard(sock)
            text = plan[sock][0]
            if mask & select.POLLOUT and sock in writing:
                if cuts[sock]:
                    with contextlib.suppress(BlockingIOError):
                        sent[sock] += sock.send(text[sent[sock] : cuts[sock][0]])
                    if sent[sock] == cuts[sock][0]:
                        cuts[sock].pop(0)
                else:
                    sock.shutdown(socket.SHUT_WR)
                    writing.discard(sock)
            wanted = (select.POLLIN if sock in open_ends else 0) | (select.POLLOUT if sock in writing else 0)
            poll.modify(sock, wanted) if wanted else poll.register(sock, 0)
    return bytes(seen[client]), bytes(seen[server])


@pytest.mark.parametrize("seed", range(6))
def test_random_talk_with_half_closes_is_that_of_a_direct_connection(pair: Pair, seed: int) -> None:
    plain_client, plain_server = direct()
    expected = talk(plain_client, plain_server, seed, 60)
    client, server = pair.connect()
    assert talk(client, server, seed, 60) == expected
    for sock in (client, server, plain_client, plain_server):
        sock.close()
    wait_until(lambda: pair.a.ended() and pair.b.ended())
    for proxy in (pair.a, pair.b):
        [outcome] = proxy.ended()
        assert (outcome["bytes_received"], outcome["bytes_sent"]) == (len(expected[0]), len(expected[1]))
        assert outcome["close_reason"] == "ended"


def test_ten_thousand_small_messages_are_those_of_a_direct_connection(pair: Pair) -> None:
    plain_client, plain_server = direct()
    expected = talk(plain_client, plain_server, 77, 7000)
    client, server = pair.connect()
    assert talk(client, server, 77, 7000) == expected
    for sock in (client, server, plain_client, plain_server):
        sock.close()


def test_a_held_back_sender_that_has_ended_loses_nothing(pair: Pair) -> None:
    """Both ends orderly while the proxy holds back: the kernel says HUP, which is not a reset."""
    size = 24 << 20
    client, server = pair.connect()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    client.settimeout(0.3)
    text = random.Random(5).randbytes(1 << 20)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < size:
            sent += client.send(text[sent % len(text) : sent % len(text) + 65536])
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    got = read_to_the_end(server)
    assert len(got) == sent
    assert all(
        got[at : at + 4096] == text[at % len(text) : at % len(text) + 4096] for at in range(0, sent - 4096, 1 << 20)
    )
    server.close()
    client.close()
    wait_until(lambda: pair.a.ended() and pair.b.ended())
    for proxy in (pair.a, pair.b):
        assert proxy.ended()[0]["close_reason"] == "ended"
        assert proxy.ended()[0]["bytes_sent"] == sent


def test_a_reset_while_the_tunnel_holds_back_is_a_reset(pair: Pair) -> None:
    client, server = pair.connect()
    client.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            client.send(bytes(65536))
    abort(client)
    with pytest.raises(ConnectionResetError):
        read_to_the_end(server)
    wait_until(lambda: pair.a.ended() and pair.b.ended())
    assert pair.a.ended()[0]["close_reason"] == "reset by the application"
    after, other = pair.connect()  # the proxies go on
    after.sendall(b"next")
    assert other.recv(10) == b"next"


def test_a_reader_that_pauses_and_goes_on_gets_everything(pair: Pair) -> None:
    client, server = pair.connect()
    text = random.Random(6).randbytes(3 << 20)
    got = bytearray()
    view = memoryview(text)
    client.setblocking(False)
    while len(got) < len(text):
        with contextlib.suppress(BlockingIOError):
            view = view[client.send(view[:200_000]) :]
        if not view or random.random() < 0.3:
            time.sleep(0.002)
            got += server.recv(150_000)
    assert bytes(got) == text


@pytest.mark.parametrize("seed", range(3))
def test_resets_at_any_moment_leave_nothing_behind(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(40):
        client, server = pair.connect()
        for sock in (client, server):
            sock.setblocking(False)
        for _ in range(chance.randrange(6)):
            with contextlib.suppress(OSError):
                chance.choice((client, server)).send(bytes(chance.choice((1, 300, 50_000))))
        first, second = chance.sample((client, server), 2)
        (abort if chance.random() < 0.7 else socket.socket.close)(first)
        time.sleep(chance.choice((0, 0, 0.002)))
        (abort if chance.random() < 0.5 else socket.socket.close)(second)
    wait_until(lambda: len(pair.a.ended()) == len(pair.b.ended()) == 40)
    for proxy in (pair.a, pair.b):
        assert proxy.worker.defects == 0
        assert proxy.worker._shared is not None
        assert not proxy.worker._shared.live
