"""What a lying peer, a defect or a lack of descriptors may cost: one connection, never the listener or a channel."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from agent import channel
from agent.certs.authority import Leaf, make_intermediate, make_leaf
from agent.certs.contexts import client_context, server_context
from agent.proxy import source
from agent.tunnel.frames import FrameType, Refusal, RefusedReason, frame, refused_payload
from agent.tunnel.opening import Opening, encode
from policy.identity import SpiffeId
from tests.unit.proxy_pair import DOMAIN, WAIT_S, Pair, running, wait_until

DENIED = frame(FrameType.REFUSED, refused_payload(Refusal(RefusedReason.DENIED)))
NO_FRAME = b"\xff\xff\xff\xff"


@pytest.fixture
def pair() -> Iterator[Pair]:
    with running() as made:
        yield made


def leaf_of(pair: Pair, host: str, application: str) -> Leaf:
    """A stolen host: whoever has its intermediate can make this."""
    now = time.time()
    return make_leaf(make_intermediate(pair.root, DOMAIN, host, now), SpiffeId(DOMAIN, host, application), now)


@contextlib.contextmanager
def lying_destination(pair: Pair, answer: bytes) -> Iterator[None]:
    """In the place of host b: answers whatever it reads first with `answer`, in one TLS record."""
    context = server_context(leaf_of(pair, "b", "core"), pair.root.certificate_pem)
    listener = socket.create_server(("127.0.0.1", 0))
    served: list[ssl.SSLSocket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                tls = context.wrap_socket(listener.accept()[0], server_side=True)
                served.append(tls)
                tls.recv(65536)
                tls.write(answer)

    pair.tunnel_ports[1] = listener.getsockname()[1]
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        for sock in (listener, *served):
            sock.close()


def lying_opener(pair: Pair) -> ssl.SSLSocket:
    context = client_context(leaf_of(pair, "a", "ledger"), pair.root.certificate_pem)
    sock = socket.create_connection(pair.b.tunnel.getsockname(), WAIT_S)
    return context.wrap_socket(sock, server_hostname=SpiffeId(DOMAIN, "b", "core").server_name)


def opening(pair: Pair, client: str) -> bytes:
    claim = Opening(
        connection_id=os.urandom(16),
        source=(ip_address(client), 40000),
        destination=(ip_address("127.9.9.9"), pair.port),
        identity=SpiffeId(DOMAIN, "a", "ledger"),
        service="core",
        traceparent=None,
        hops=0,
    )
    return frame(FrameType.OPEN, encode(claim))


def works(pair: Pair) -> bool:
    client, server = pair.connect()
    with client, server:
        client.sendall(b"x")
        return server.recv(1) == b"x"


def refused(pair: Pair) -> None:
    with pytest.raises(ConnectionResetError):  # which may come before connect() has returned
        pair.dial().recv(1)


def test_a_tunnel_that_was_violated_behind_its_refusal_is_never_used_again() -> None:
    pair = Pair()
    with lying_destination(pair, DENIED + NO_FRAME):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("agent.proxy.state.load_directory", lambda *_: pair.directory())
            pair.a.start(pair.snapshot("a"))
        try:
            for _ in range(3):
                refused(pair)
            assert pair.a.worker.defects == 0
            assert pair.a.worker._pool.idle_count() == 0
        finally:
            pair.a.worker._loop.stopped = True
    pair.b._threads = []  # never started
    pair.close()


@pytest.mark.parametrize("client", ["224.0.0.1", "255.255.255.255", "169.254.0.9", "2001:db8::9"])
def test_a_peer_cannot_show_the_application_an_address_it_cannot_have(pair: Pair, client: str) -> None:
    with lying_opener(pair) as peer:
        peer.write(opening(pair, client))
        answer = peer.recv(4096)
        assert answer[4] == RefusedReason.NO_IDENTITY
        assert client.encode() in answer
        peer.write(opening(pair, "192.0.2.7"))  # the word of a proven host about an address nobody else claims
        pair.app.accept()[0].close()
        assert peer.recv(4)[0] == FrameType.OPENED


def test_a_flood_of_bad_opens_ends_the_tunnel(pair: Pair) -> None:
    with lying_opener(pair) as peer, contextlib.suppress(ConnectionError, ssl.SSLError):
        for _ in range(20):
            peer.write(frame(FrameType.OPEN, b"hello"))
            peer.recv(4096)
    wait_until(lambda: pair.b.ended("reject"))
    assert len(pair.b.ended("reject")) <= 8


def test_a_defect_in_one_connection_leaves_listener_and_channels_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(source, "decide", fail)
        refused(pair)  # met in the answer about who calls
        refused(pair)  # met while accepting: who calls is known by now
    wait_until(lambda: pair.a.worker.defects == 2)
    assert works(pair)


def test_a_stream_that_cannot_be_reviewed_does_not_keep_a_policy_from_the_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair.connect()
    with monkeypatch.context() as patch:
        patch.setattr(source.SourceStream, "review", lambda *_: 1 / 0)
        pair.a.give(pair.snapshot("a"))
        wait_until(lambda: pair.a.worker.defects)
    pair.a.give(pair.snapshot("a", allow="[]"))
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    server.close()


def test_a_snapshot_whose_body_was_lost_is_asked_for_again(pair: Pair) -> None:
    orders = pair.a._ends["orders"][1]
    while channel.receive(orders) is not None:
        pass
    channel.send(orders, {"type": "snapshot"})  # as it arrives when there is no descriptor left for the body
    wait_until(lambda: (message := channel.receive(orders)) is not None and message[0]["type"] == "hello")


def test_what_is_no_message_does_not_cost_a_channel(pair: Pair) -> None:
    for nonsense in (b"", b"{", b"[]", b"\xff"):
        pair.a._ends["orders"][1].send(nonsense)
        pair.a._ends["who"][1].send(nonsense)
    assert works(pair)
    pair.a.give(pair.snapshot("a", allow="[]"))
    wait_until(lambda: pair.a.worker._shared and pair.a.worker._shared.state.generation == pair._generation)
    refused(pair)
