"""What an application sees through two proxies: bytes, ends, resets, refusals. Real sockets and TLS, no root."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from agent.records import unpack_flow
from tests.unit.proxy_pair import WAYS, Pair, running, wait_until


@pytest.fixture(params=[(way, way) for way in WAYS], ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with running(ways=request.param) as made:
        yield made


def test_bytes_arrive_both_ways_and_one_outcome_on_each_side_tells(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.sendall(b"an answer")
    assert client.recv(100) == b"an answer"
    client.close()
    assert server.recv(100) == b""
    server.close()
    wait_until(lambda: pair.a.ended() and pair.b.ended())
    [source], [destination] = pair.a.ended(), pair.b.ended()
    for outcome in (source, destination):
        assert outcome["source"] == "spiffe://test.bank/a/ledger"
        assert outcome["destination"] == "spiffe://test.bank/b/core"
        assert (outcome["verdict"], outcome["rule"]) == ("allow", "ledger-core")
        assert (outcome["bytes_sent"], outcome["bytes_received"]) == (8, 9)
        assert outcome["tls"]["version"] == "TLSv1.3"
        assert outcome["added_ms"]["p50"] > 0
        assert outcome["close_reason"] == "ended"
    assert source["connection"] == destination["connection"]
    assert source["connection"] != ""


def test_the_server_is_told_the_clients_own_address(pair: Pair) -> None:
    client, server = pair.connect()
    noted = unpack_flow(pair.b.flows.noted[0])
    assert (str(noted.source), noted.source_port) == ("127.0.0.1", 40000)
    client.close()
    server.close()


def test_a_server_that_speaks_first_is_heard(pair: Pair) -> None:
    client, server = pair.connect()
    server.sendall(b"220 welcome")
    assert client.recv(100) == b"220 welcome"
    client.close()
    server.close()


def test_a_response_arrives_after_the_client_half_closed(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"all of it")
    client.shutdown(socket.SHUT_WR)
    assert server.recv(100) == b"all of it"
    assert server.recv(100) == b""
    server.sendall(b"late answer")
    server.close()
    assert client.recv(100) == b"late answer"
    assert client.recv(100) == b""


def test_the_server_may_half_close_first(pair: Pair) -> None:
    client, server = pair.connect()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(100) == b""
    client.sendall(b"still heard")
    client.close()
    assert server.recv(100) == b"still heard"
    assert server.recv(100) == b""


def abort(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_a_reset_by_the_client_is_a_reset_to_the_server(pair: Pair) -> None:
    client, server = pair.connect()
    abort(client)
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    wait_until(pair.a.ended)
    assert pair.a.ended()[0]["close_reason"] == "reset by the application"


def test_a_reset_by_the_server_is_a_reset_to_the_client(pair: Pair) -> None:
    client, server = pair.connect()
    abort(server)
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_reset_after_half_close_still_arrives(pair: Pair) -> None:
    client, server = pair.connect()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    abort(client)
    wait_until(pair.b.ended)
    with pytest.raises(BrokenPipeError):  # what Linux answers for a reset after the peer's end (tcp_reset, CLOSE_WAIT)
        server.sendall(b"nobody is there any more")


def test_one_tunnel_carries_one_stream_after_another(pair: Pair) -> None:
    serials = set()
    for number in range(20):
        client, server = pair.connect()
        client.sendall(b"%d" % number)
        assert server.recv(100) == b"%d" % number
        client.close()
        assert server.recv(1) == b""
        server.close()
        wait_until(lambda count=number + 1: len(pair.b.ended()) == count)  # type: ignore[misc]
    wait_until(lambda: len(pair.a.ended()) == 20)
    serials = {outcome["tls"]["peer_serial"] for outcome in pair.a.ended()}
    assert len(serials) == 1
    assert pair.a.worker._pool.idle_count() == 1


def test_64_mib_both_ways_at_once_arrive_unchanged(pair: Pair) -> None:
    size = 64 << 20
    client, server = pair.connect()
    block = hashlib.sha256(b"seed").digest() * 2048
    results: dict[str, str] = {}

    def send(sock: socket.socket) -> None:
        for _ in range(size // len(block)):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    def receive(name: str, sock: socket.socket) -> None:
        digest = hashlib.sha256()
        while data := sock.recv(1 << 18):
            digest.update(data)
        results[name] = digest.hexdigest()

    threads = [threading.Thread(target=send, args=(sock,)) for sock in (client, server)]
    threads += [threading.Thread(target=receive, args=pairing) for pairing in (("client", client), ("server", server))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    expected = hashlib.sha256(block * (size // len(block))).hexdigest()
    assert results == {"client": expected, "server": expected}
    wait_until(pair.a.ended)
    assert (pair.a.ended()[0]["bytes_sent"], pair.a.ended()[0]["bytes_received"]) == (size, size)


def test_a_reader_that_never_reads_stops_its_sender(pair: Pair) -> None:
    client, server = pair.connect()
    client.settimeout(1.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 256 << 20:
            sent += client.send(b"x" * 65536)
    assert sent < 64 << 20  # socket buffers of three connections, and 64 KiB in each proxy
    abort(client)
    abort(server)


def test_one_byte_at_a_time_arrives(pair: Pair) -> None:
    client, server = pair.connect()
    for number in range(200):
        client.sendall(bytes([number]))
        assert server.recv(1) == bytes([number])
        server.sendall(bytes([number]))
        assert client.recv(1) == bytes([number])


def test_a_dead_warm_tunnel_is_replaced_without_the_application_noticing(pair: Pair) -> None:
    client, server = pair.connect()
    client.close()
    assert server.recv(1) == b""
    server.close()
    wait_until(lambda: pair.a.worker._pool.idle_count() == 1)
    [link] = pair.b.worker._links
    socket.socket(fileno=socket.dup(link._tls.fileno())).shutdown(socket.SHUT_RDWR)
    client, server = pair.connect()
    client.sendall(b"again")
    assert server.recv(100) == b"again"


def test_nobody_listening_is_a_reset_with_the_reason_in_the_outcome(pair: Pair) -> None:
    pair.app.close()
    with pytest.raises(ConnectionResetError):  # of the connect() itself, when the refusal is that quick
        pair.dial().recv(1)
    wait_until(lambda: pair.a.ended() and pair.b.ended())
    assert "connect_refused" in pair.a.ended()[0]["close_reason"]
    assert "connect_refused" in pair.b.ended()[0]["close_reason"]


def test_another_application_on_the_port_is_not_served(pair: Pair) -> None:
    pair.b.owner = "/test/ledger"
    with pytest.raises(ConnectionResetError):  # of the connect() itself, when the refusal is that quick
        pair.dial().recv(1)
    wait_until(lambda: pair.b.ended("deny") and pair.a.ended())
    assert "another application listens there" in pair.b.ended("deny")[0]["reason"]
    assert "wrong_destination" in pair.a.ended()[0]["close_reason"]


def test_a_connection_without_a_flow_is_refused_and_told(pair: Pair) -> None:
    pair.a.flows.original = None
    with pytest.raises(ConnectionResetError):  # of the connect() itself, when the refusal is that quick
        pair.dial().recv(1)
    wait_until(lambda: pair.a.ended("deny"))
    assert pair.a.ended("deny")[0]["reason"] == "no_flow"


def test_an_application_without_identity_is_refused(pair: Pair) -> None:
    pair.a.cgroup = "/test/stranger"
    with pytest.raises(ConnectionResetError):  # of the connect() itself, when the refusal is that quick
        pair.dial().recv(1)
    wait_until(lambda: pair.a.ended("deny"))
    assert pair.a.ended("deny")[0]["reason"] == "no_identity"


def test_the_destinations_own_policy_counts(pair: Pair) -> None:
    pair.b.give(pair.snapshot("b", allow="[]"))
    wait_until(lambda: pair.b.worker._shared and not pair.b.worker._shared.state.policy.rules[0].sources)
    with pytest.raises(ConnectionResetError):  # of the connect() itself, when the refusal is that quick
        pair.dial().recv(1)
    wait_until(lambda: pair.b.ended("deny") and pair.a.ended())
    assert pair.b.ended("deny")[0]["reason"] == "no_matching_rule"
    assert "denied" in pair.a.ended()[0]["close_reason"]


def test_a_policy_change_cuts_a_live_connection(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"live")
    assert server.recv(100) == b"live"
    pair.b.give(pair.snapshot("b", allow="[]"))
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    wait_until(lambda: pair.b.ended())
    assert pair.b.ended()[0]["close_reason"] == "revoked by policy"


def test_a_policy_change_while_the_tunnel_opens_cuts_it_too(pair: Pair) -> None:
    pair.b.silent = True  # the destination waits to hear who listens
    client = pair.dial()
    wait_until(lambda: pair.b.worker._shared and pair.b.worker._shared.live)
    pair.b.give(pair.snapshot("b", allow="[]"))
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: pair.b.ended("deny"))
    assert pair.b.ended("deny")[0]["reason"] == "no_matching_rule"


def test_new_certificates_do_not_touch_a_live_connection(pair: Pair) -> None:
    client, server = pair.connect()
    for proxy, host in ((pair.a, "a"), (pair.b, "b")):
        generation = proxy.worker._shared.state.leaf_generation if proxy.worker._shared else 0
        proxy.give(pair.snapshot(host))
        wait_until(lambda p=proxy, g=generation: p.worker._shared.state.leaf_generation != g)  # type: ignore[misc]
    client.sendall(b"still here")
    assert server.recv(100) == b"still here"
    second_client, second_server = pair.connect()
    second_client.sendall(b"new one")
    assert second_server.recv(100) == b"new one"


def test_garbage_on_the_tunnel_port_is_counted_and_harms_nobody(pair: Pair) -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(100), b"\x00"):
        with (
            socket.create_connection(pair.b.tunnel.getsockname(), 10) as stranger,
            contextlib.suppress(OSError),  # it may be cut at any of these steps
        ):
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
    wait_until(lambda: len(pair.b.ended("reject")) == 3)
    client, server = pair.connect()
    client.sendall(b"unharmed")
    assert server.recv(100) == b"unharmed"


def test_a_silent_handshake_holds_nobody_up() -> None:
    with running("limits: {handshake_timeout: 300ms}\n") as pair:
        silent = [socket.create_connection(pair.b.tunnel.getsockname()) for _ in range(40)]
        client, server = pair.connect()
        client.sendall(b"served meanwhile")
        assert server.recv(100) == b"served meanwhile"
        wait_until(lambda: len(pair.b.ended("reject")) == 40)
        assert all(outcome["reason"].startswith("timeout") for outcome in pair.b.ended("reject"))
        for sock in silent:
            sock.close()


def answer_to_a_frame(context: ssl.SSLContext, sock: socket.socket) -> str:
    """ "tls" if anything is answered inside TLS; else what the refusal looked like from outside."""
    try:
        with context.wrap_socket(sock, server_hostname="core.b.test.bank") as tls:
            tls.settimeout(10)
            tls.sendall(b"\x01\x00\x00\x01x")
            return "tls" if tls.recv(1) else "closed"
    except OSError as error:
        return type(error).__name__.lower().replace("ssl", "")


def test_tls_without_a_client_certificate_is_refused(pair: Pair) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["underpass/1"])
    with socket.create_connection(pair.b.tunnel.getsockname()) as sock:
        assert "tls" not in answer_to_a_frame(context, sock)
    wait_until(lambda: pair.b.ended("reject"))


def test_a_200_connection_storm_leaves_nothing_behind(pair: Pair) -> None:
    for _ in range(20):
        clients, servers = zip(*(pair.connect() for _ in range(10)), strict=True)
        for client in clients:
            client.sendall(b"ping")
        for sock in (*clients, *servers):
            sock.close()
    wait_until(lambda: len(pair.a.ended()) == 200 and len(pair.b.ended()) == 200)
    assert not pair.a.worker._shared.live if pair.a.worker._shared else False


def test_without_a_policy_a_connection_is_refused_and_not_left_hanging() -> None:
    with running(start=False) as pair, mock.patch("agent.proxy.worker.FIRST_SNAPSHOT_LIMIT_S", 0.2):
        pair.a.run()
        with pytest.raises(ConnectionResetError):
            pair.dial().recv(1)
        wait_until(lambda: pair.a.ended("deny"))
        assert pair.a.ended("deny")[0]["reason"] == "no_policy"
        pair.a.give(pair.snapshot("a"))
        pair.b.run()
        pair.b.give(pair.snapshot("b"))
        wait_until(lambda: pair.a.told("ready"))
        wait_until(lambda: pair.b.told("ready"))
        connected, server = pair.connect()
        connected.sendall(b"now")
        assert server.recv(100) == b"now"


def test_a_peer_that_never_reads_its_pongs_is_dropped(pair: Pair) -> None:
    client, server = pair.connect()
    client.close()
    assert server.recv(1) == b""
    server.close()
    wait_until(lambda: pair.b.ended())
    [link] = pair.b.worker._links
    for _ in range(200):
        link._held.append(b"held")
        link.send(b"more")
    wait_until(lambda: link.closed)


def test_a_proxy_that_is_killed_resets_its_applications(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"live")
    assert server.recv(100) == b"live"
    for proxy in (pair.a, pair.b):
        assert proxy.worker._shared
        [stream] = proxy.worker._shared.live
        linger = stream._app.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)  # type: ignore[attr-defined]
        assert struct.unpack("ii", linger) == (1, 0)  # what the kernel goes by when the process is gone


def test_a_tunnel_that_its_opener_forgot_is_closed() -> None:
    with running("limits: {idle_tunnel: 24s}\n") as pair, mock.patch("agent.proxy.worker.FORGOTTEN_AFTER", 0):
        # The opener's own pool would keep it for 24 s, longer than wait_until waits; the destination looks every 6 s.
        client, server = pair.connect()
        client.close()
        assert server.recv(1) == b""
        server.close()
        wait_until(lambda: pair.b.ended())
        [link] = pair.b.worker._links
        wait_until(lambda: link.closed)


def test_a_peer_that_does_not_end_a_reset_stream_loses_the_tunnel(pair: Pair) -> None:
    client, server = pair.connect()
    client.sendall(b"live")
    assert server.recv(100) == b"live"
    assert pair.a.worker._shared
    [stream] = pair.a.worker._shared.live
    link = stream._relay._link  # type: ignore[attr-defined]
    pair.b.worker._loop.stopped = True  # it takes nothing in any more
    with mock.patch("agent.proxy.relay.LAST_FRAME_LIMIT_S", 0.2):
        pair.b._threads[0].join(5)
        abort(client)
        wait_until(lambda: link.closed)
