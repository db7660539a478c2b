"""Real handshakes over socket pairs: what each side learns, and who is turned away."""

from __future__ import annotations

import errno
import gc
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from agent.certs.authority import Issued, Leaf, make_intermediate, make_leaf, make_root
from agent.certs.contexts import (
    ServerContexts,
    client_context,
    server_context,
    speaks_underpass,
    verified_chain,
    wrap,
)
from agent.certs.verify import Reason, Refusal, verify_peer
from policy.identity import SpiffeId
from tests.unit.forge import LEDGER_A, NOW, TD, TELLER_B, as_leaf, forge, make_mesh, uri

MESH = make_mesh()
ROOTS = MESH.root.certificate_pem
LEDGER, TELLER = make_leaf(MESH.a, LEDGER_A, NOW, 3600), make_leaf(MESH.b, TELLER_B, NOW, 3600)
HOST_A = ServerContexts([LEDGER, make_leaf(MESH.a, SpiffeId(TD, "a", "audit"), NOW, 3600)], ROOTS)
PATIENCE_S = 5.0


OPENED: list[ssl.SSLSocket] = []


@pytest.fixture(autouse=True)
def _close_what_was_opened() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@dataclass
class Side:
    """One end after the handshake and one byte each way."""

    tls: ssl.SSLSocket | None = None
    error: OSError | None = None
    peer: SpiffeId | Refusal | None = None


def take_part(
    context: ssl.SSLContext, sock: socket.socket, server_side: bool, name: str | None, session: ssl.SSLSession | None
) -> Side:
    side = Side()
    try:
        side.tls = wrap(context, sock, server_side, name)
        OPENED.append(side.tls)
        if session is not None:
            side.tls.session = session
        side.tls.do_handshake()
        # In TLS 1.3 the client learns only by reading whether the server has accepted its certificate.
        side.tls.sendall(b"s" if server_side else b"c")
        assert side.tls.recv(1) == (b"c" if server_side else b"s")
        side.peer = verify_peer(verified_chain(side.tls), TD)
    except OSError as error:
        side.error = error
        if side.tls is not None:
            side.tls.close()  # or the other end would wait for its patience
    return side


def shake(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    name: str | None = LEDGER_A.server_name,
    session: ssl.SSLSession | None = None,
) -> tuple[Side, Side]:
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(PATIENCE_S)
    with ThreadPoolExecutor(2) as pool:
        far = pool.submit(take_part, server, ends[1], True, None, None)
        near = pool.submit(take_part, client, ends[0], False, name, session)
        return near.result(), far.result()


def client(leaf: Leaf = TELLER, roots: bytes = ROOTS) -> ssl.SSLContext:
    return client_context(leaf, roots)


def refused_by(side: Side, words: str) -> None:
    assert side.error is not None
    assert words in str(side.error), side.error
    assert side.peer is None


# Who is who


def test_both_sides_learn_the_identity_of_the_other() -> None:
    near, far = shake(client(), HOST_A.base)
    assert (near.peer, far.peer) == (LEDGER_A, TELLER_B)
    assert near.tls is not None
    assert near.tls.version() == "TLSv1.3"
    assert speaks_underpass(near.tls)


def test_server_name_chooses_among_the_leaves_of_a_host() -> None:
    near, _ = shake(client(), HOST_A.base, f"audit.a.{TD}")
    assert near.peer == SpiffeId(TD, "a", "audit")
    assert HOST_A.server_names == {LEDGER_A.server_name, f"audit.a.{TD}"}


def test_application_named_like_its_host_is_accepted() -> None:
    same = SpiffeId(TD, "b", "b")
    _, far = shake(client(make_leaf(MESH.b, same, NOW, 60)), HOST_A.base)
    assert far.peer == same


def test_chain_is_empty_until_the_handshake_is_done() -> None:
    ends = socket.socketpair()
    with ends[1], wrap(HOST_A.base, ends[0], True) as early:
        assert verified_chain(early) == []
    assert verified_chain(early) == []


def records(flight: bytes) -> Iterator[bytes]:
    while flight:
        size = 5 + int.from_bytes(flight[3:5], "big")
        yield flight[:size]
        flight = flight[size:]


def test_certificate_without_proof_of_its_key_is_nobody() -> None:
    """A copied certificate comes first, the signature that only its owner can make comes after."""
    to_client, to_server, from_client = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client().wrap_bio(to_client, from_client, server_hostname=LEDGER_A.server_name)
    far = HOST_A.base.wrap_bio(to_server, to_client, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        near.do_handshake()
    to_server.write(from_client.read())
    with pytest.raises(ssl.SSLWantReadError):
        far.do_handshake()
    near.do_handshake()
    *before, finished = records(from_client.read())
    known_inside = False
    for record in before:
        to_server.write(record)
        with pytest.raises(ssl.SSLWantReadError):
            far.do_handshake()
        known_inside = known_inside or bool(getattr(far, "_sslobj").get_verified_chain())  # noqa: B009
        assert verified_chain(far) == []
    assert known_inside  # or this test would show nothing
    to_server.write(finished)
    far.do_handshake()
    assert verify_peer(verified_chain(far), TD) == TELLER_B


def test_junk_certificates_sent_along_do_not_count() -> None:
    junk = Leaf(TELLER_B, TELLER.chain_pem + MESH.a.certificate_pem + ROOTS, TELLER.key_pem, 0, 0, 0)
    _, far = shake(client(junk), HOST_A.base)
    assert far.peer == TELLER_B
    assert far.tls is not None
    assert len(verified_chain(far.tls)) == 3


# A stolen host: its intermediate signs for another host


@pytest.fixture(params=["client", "server"])
def meet(request: pytest.FixtureRequest) -> Callable[[Leaf], Side]:
    """Run a handshake with a bad leaf on one side and answer the honest side."""

    def as_client(leaf: Leaf) -> Side:
        return shake(client(leaf), HOST_A.base)[1]

    def as_server(leaf: Leaf) -> Side:
        return shake(client(), server_context(leaf, ROOTS))[0]

    return as_client if request.param == "client" else as_server


def test_stolen_intermediate_is_stopped_by_name_constraints(meet: Callable[[Leaf], Side]) -> None:
    refused_by(meet(make_leaf(MESH.b, LEDGER_A, NOW, 3600)), "permitted subtree violation")


def test_stolen_intermediate_that_omits_the_dns_name_is_stopped_by_its_own_name(meet: Callable[[Leaf], Side]) -> None:
    side = meet(as_leaf(forge(MESH.b, [uri(LEDGER_A.uri)]), LEDGER_A, MESH.b, MESH.a))
    assert isinstance(side.peer, Refusal)
    assert side.peer.reason is Reason.FOREIGN_HOST


def test_stolen_intermediate_cannot_leave_the_trust_domain(meet: Callable[[Leaf], Side]) -> None:
    refused_by(meet(as_leaf(forge(MESH.b, [uri("spiffe://x.test/b/y")]), TELLER_B, MESH.b)), "permitted subtree")


def test_stolen_intermediate_cannot_make_an_intermediate(meet: Callable[[Leaf], Side]) -> None:
    below = forge(MESH.b, [uri(f"spiffe://{TD}/a")], ca=True)
    leaf = forge(below, [uri(LEDGER_A.uri)])
    refused_by(meet(as_leaf(leaf, LEDGER_A, below, MESH.b)), "path length constraint exceeded")


def test_leaf_cannot_sign(meet: Callable[[Leaf], Side]) -> None:
    signer = forge(MESH.a, [uri(f"spiffe://{TD}/a")])
    leaf = forge(signer, [uri(LEDGER_A.uri)])
    refused_by(meet(as_leaf(leaf, LEDGER_A, signer, MESH.a)), "certificate verify failed")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([LEDGER_A.uri, TELLER_B.uri], Reason.NAMES),
        ([f"spiffe://{TD}/b/teller\0"], Reason.NOT_AN_IDENTITY),
        ([f"spiffe://{TD}/b/t%65ller"], Reason.NOT_AN_IDENTITY),
        ([f"spiffe://{TD}/b/Teller"], Reason.NOT_AN_IDENTITY),
    ],
)
def test_names_that_openssl_lets_pass_are_refused(
    meet: Callable[[Leaf], Side], names: list[str], reason: Reason
) -> None:
    side = meet(as_leaf(forge(MESH.b, [uri(name) for name in names]), TELLER_B, MESH.b))
    assert isinstance(side.peer, Refusal)
    assert side.peer.reason is reason


def test_leaf_signed_by_the_root_itself_is_refused(meet: Callable[[Leaf], Side]) -> None:
    side = meet(as_leaf(forge(MESH.root, [uri(LEDGER_A.uri)]), LEDGER_A))
    assert isinstance(side.peer, Refusal)
    assert side.peer.reason is Reason.CHAIN_LENGTH


# Chains OpenSSL must refuse


def expired(issuer: Issued) -> Leaf:
    return as_leaf(forge(issuer, [uri(TELLER_B.uri)], start=NOW - 200, end=NOW - 100), TELLER_B, issuer)


def below_expired_intermediate() -> Leaf:
    old = forge(MESH.root, [uri(f"spiffe://{TD}/b")], ca=True, start=NOW - 200, end=NOW - 100)
    return as_leaf(forge(old, [uri(TELLER_B.uri)]), TELLER_B, old)


def of_other_root() -> Leaf:
    return make_leaf(make_intermediate(make_root(TD, NOW), TD, "b", NOW), TELLER_B, NOW, 3600)


BAD_CHAINS: dict[str, tuple[Callable[[], Leaf], str]] = {
    "self-signed": (lambda: as_leaf(forge(None, [uri(TELLER_B.uri)]), TELLER_B), "self-signed certificate"),
    "other root": (of_other_root, "unable to get local issuer certificate"),
    "expired leaf": (lambda: expired(MESH.b), "certificate has expired"),
    "expired intermediate": (below_expired_intermediate, "certificate has expired"),
    "not yet valid": (
        lambda: as_leaf(forge(MESH.b, [uri(TELLER_B.uri)], start=NOW + 600), TELLER_B, MESH.b),
        "not yet valid",
    ),
    "intermediate withheld": (
        lambda: as_leaf(forge(MESH.b, [uri(TELLER_B.uri)]), TELLER_B),
        "unable to get local issuer",
    ),
    "no key identifiers": (
        lambda: as_leaf(forge(MESH.b, [uri(TELLER_B.uri)], identifiers=False), TELLER_B, MESH.b),
        "Missing Authority Key Identifier",
    ),
}


@pytest.mark.parametrize("case", BAD_CHAINS)
def test_bad_chain_is_refused_in_both_directions(meet: Callable[[Leaf], Side], case: str) -> None:
    make, words = BAD_CHAINS[case]
    refused_by(meet(make()), words)


# What the contexts insist on


def stock(leaf: Leaf | None = TELLER, alpn: str | None = "underpass/1") -> ssl.SSLContext:
    """A client of somebody else's making, as lax as Python allows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if leaf is not None:
        lent = client_context(leaf, ROOTS)
        lent.check_hostname, lent.verify_mode = False, ssl.CERT_NONE
        lent.minimum_version, lent.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.MAXIMUM_SUPPORTED
        lent.options &= ~ssl.OP_NO_TICKET
        context = lent
    context.set_alpn_protocols([alpn] if alpn else [])
    return context


def test_tls_1_2_is_refused() -> None:
    old = stock()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    refused_by(shake(old, HOST_A.base)[1], "unsupported protocol")


def test_tls_1_2_server_is_refused() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    near, _ = shake(client(), old)
    assert isinstance(near.error, ssl.SSLError)


def test_client_without_certificate_is_refused() -> None:
    near, far = shake(stock(leaf=None), HOST_A.base)
    refused_by(far, "peer did not return a certificate")
    assert near.error is not None  # the alert, or a broken pipe if its own write came first


@pytest.mark.parametrize("name", [None, f"unknown.a.{TD}", TELLER_B.server_name, f"a.{TD}", "LEDGER.a." + TD])
def test_server_name_that_is_not_exactly_ours_is_refused(name: str | None) -> None:
    near, far = shake(client(), HOST_A.base, name)
    refused_by(near, "unrecognized name")
    assert far.error is not None


@pytest.mark.parametrize(
    ("name", "reports"),
    [
        (b"ledger..a.mesh.tst", 0),
        (b"ledger\0.a.mesh.tst", 0),
        (b".................!", 0),
        (b"\xc3\xa9edger.a.mesh.tst", 1),
    ],
)
def test_mangled_server_name_is_refused(name: bytes, reports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []  # Python cannot decode a name that is not ASCII, and tells only this hook
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    outgoing, arrived = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = client().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="xledger.a.mesh.tst")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    arrived.write(outgoing.read().replace(b"xledger.a.mesh.tst", name))
    server = HOST_A.base.wrap_bio(arrived, ssl.MemoryBIO(), server_side=True)
    with pytest.raises(ssl.SSLError, match=r"callback failed|bad extension"):
        server.do_handshake()
    assert len(reported) == reports


@pytest.mark.parametrize("alpn", [None, "h2", "underpass/2"])
def test_client_of_another_protocol_is_recognised(alpn: str | None) -> None:
    for server in (HOST_A.base, server_context(LEDGER, ROOTS)):
        near, far = shake(stock(alpn=alpn), server)
        for side in (near, far):
            assert side.tls is not None
            assert not speaks_underpass(side.tls)


def test_no_session_is_ever_resumed() -> None:
    eager = stock()
    first, _ = shake(eager, HOST_A.base)
    assert first.tls is not None
    session = first.tls.session
    assert session is not None
    assert not session.has_ticket
    second, far = shake(eager, HOST_A.base, session=session)
    assert second.tls is not None
    assert not second.tls.session_reused
    assert far.peer == TELLER_B  # the full chain was there again


def test_base_and_chosen_context_have_the_same_settings() -> None:
    one, other = HOST_A.base, server_context(LEDGER, ROOTS)
    for setting in ("options", "verify_mode", "verify_flags", "minimum_version", "maximum_version", "num_tickets"):
        assert getattr(one, setting) == getattr(other, setting), setting
    assert one.get_ca_certs(binary_form=True) == other.get_ca_certs(binary_form=True)
    assert one.verify_mode is ssl.CERT_REQUIRED
    assert one.verify_flags & ssl.VERIFY_X509_STRICT
    assert not one.options & ssl.OP_IGNORE_UNEXPECTED_EOF


def test_trusted_roots_come_with_the_chosen_context() -> None:
    """What ServerContexts relies on in SSL_set_SSL_CTX, with a base that trusts a root nobody has."""
    base = server_context(LEDGER, make_root(TD, NOW).certificate_pem)
    refused_by(shake(client(), base)[1], "unable to get local issuer certificate")
    chosen = server_context(LEDGER, ROOTS)
    base.sni_callback = lambda connection, name, context: setattr(connection, "context", chosen)
    assert shake(client(), base)[1].peer == TELLER_B


# Life of a connection


@pytest.fixture
def pair() -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    near, far = shake(client(), HOST_A.base)
    assert near.tls is not None
    assert far.tls is not None
    with near.tls, far.tls:
        yield near.tls, far.tls


def test_rotation_leaves_live_connections_alone() -> None:
    contexts = ServerContexts([LEDGER], ROOTS)
    near, far = shake(client(), contexts.base)
    assert near.tls is not None
    assert far.tls is not None
    # New root, new intermediate, new leaves: nothing the old connection was made with is trusted any more.
    root = make_root(TD, NOW)
    a, b = (make_intermediate(root, TD, host, NOW) for host in "ab")
    contexts = ServerContexts([make_leaf(a, LEDGER_A, NOW, 3600)], root.certificate_pem)
    gc.collect()
    for _ in range(3):
        near.tls.sendall(b"still here")
        assert far.tls.recv(32) == b"still here"
    renewed = make_leaf(b, TELLER_B, NOW, 3600)
    assert shake(client(renewed, root.certificate_pem), contexts.base)[1].peer == TELLER_B
    refused_by(shake(client(TELLER, root.certificate_pem), contexts.base)[1], "unable to get local issuer")


def test_cut_connection_is_an_error_and_not_an_end(pair: tuple[ssl.SSLSocket, ssl.SSLSocket]) -> None:
    near, far = pair
    socket.socket(fileno=near.detach()).close()
    with pytest.raises(ssl.SSLError, match=r"EOF|eof"):
        far.recv(1)


def test_orderly_end_is_an_end(pair: tuple[ssl.SSLSocket, ssl.SSLSocket]) -> None:
    near, far = pair
    near.settimeout(0.0)
    with pytest.raises(ssl.SSLWantReadError):
        near.unwrap()  # sends close_notify, then waits for the other's
    assert far.recv(1) == b""


# CVE-2023-40217: bytes from before the handshake


def accepted() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def test_bytes_of_a_client_that_has_left_are_never_read() -> None:
    near, far = accepted()
    near.sendall(b"pay everything")
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()  # a reset: the server's socket is not connected any more, but still holds the bytes
    with pytest.raises(OSError):
        wrap(HOST_A.base, far, True)
    assert far.fileno() == -1


def test_socket_that_is_not_connected_is_never_wrapped() -> None:
    for server_side, name in ((True, None), (False, LEDGER_A.server_name)):
        with pytest.raises(OSError) as caught:
            wrap(HOST_A.base if server_side else client(), socket.socket(), server_side, name)
        assert caught.value.errno == errno.ENOTCONN


def test_bytes_before_the_handshake_end_it() -> None:
    near, far = accepted()
    with near, wrap(HOST_A.base, far, True) as server:
        near.sendall(b"pay everything" * 10)
        near.shutdown(socket.SHUT_WR)
        server.settimeout(PATIENCE_S)
        with pytest.raises(ssl.SSLError):
            server.do_handshake()
        assert verified_chain(server) == []
        with pytest.raises(OSError):
            server.recv(1)


# Keys and file descriptors


def test_contexts_leave_no_descriptor_behind() -> None:
    before = os.listdir("/proc/self/fd")
    kept = [client() for _ in range(5)] + [ServerContexts([LEDGER], ROOTS).base]
    mismatched = Leaf(LEDGER_A, LEDGER.chain_pem, TELLER.key_pem, 0, 0, 0)
    with pytest.raises(ssl.SSLError):
        server_context(mismatched, ROOTS)
    assert os.listdir("/proc/self/fd") == before
    assert kept
