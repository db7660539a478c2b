"""Leaves and roots -> `ssl.SSLContext`: TLS 1.3 only, both sides verify, no resumption, ALPN `underpass/1`.

OpenSSL answers "is this chain sound?"; `verify.verify_peer` answers "whose is it?". A connection is authenticated only
after both, and in this order: `wrap`, `do_handshake()` until it returns, `speaks_underpass`,
`verify_peer(verified_chain(...))`, and on the client a comparison with the identity it wanted.
In TLS 1.3 the client's handshake returns before the server has judged the client's certificate: a refusal reaches the
client as an alert on its first read.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterable
from typing import Any

from agent.certs.authority import Leaf
from policy.identity import SpiffeId

ALPN = "underpass/1"
_DER = 2  # _ssl.ENCODING_DER


def client_context(leaf: Leaf, roots_pem: bytes) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_CLIENT, roots_pem)
    _load_leaf(context, leaf)
    return context


def server_context(leaf: Leaf, roots_pem: bytes) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER, roots_pem)
    _load_leaf(context, leaf)
    return context


class ServerContexts:
    """Every leaf of this host behind one listener, chosen by server name. Immutable: rotation builds a new one and
    swaps it in; connections keep the context they started with.
    """

    def __init__(self, leaves: Iterable[Leaf], roots_pem: bytes) -> None:
        by_name: dict[str, ssl.SSLContext] = {}
        self._served: dict[ssl.SSLContext, SpiffeId] = {}
        for leaf in leaves:
            context = by_name[leaf.identity.server_name] = server_context(leaf, roots_pem)
            self._served[context] = leaf.identity

        def select(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
            # Exact match, and nothing to fall back to: a default certificate would let a client that names nobody,
            # or somebody else, reach an application of this host. (A name that is not ASCII never gets here: Python
            # ends that handshake itself, and tells only sys.unraisablehook, which a worker should count, not print.)
            chosen = by_name.get(name or "")
            if chosen is None:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            # The swap changes the certificate, the trusted roots and the ALPN choice. Protocol version, options,
            # verify mode and verify flags stay those of the base, copied when the connection was made (SSL_new): so
            # both come from the same `_context`, and the base has roots too.
            connection.context = chosen
            return None

        self.base = _context(ssl.PROTOCOL_TLS_SERVER, roots_pem)  # no certificate of its own: unnamed, unserved
        self.base.sni_callback = select
        self.server_names = frozenset(by_name)

    def served(self, connection: ssl.SSLSocket | ssl.SSLObject) -> SpiffeId | None:
        """The identity whose certificate this connection was answered with; None before the client named one."""
        return self._served.get(connection.context)


def wrap(
    context: ssl.SSLContext, sock: socket.socket, server_side: bool, server_name: str | None = None
) -> ssl.SSLSocket:
    """Take over a connected socket. The caller must finish `do_handshake()` before its first read or write.

    CVE-2023-40217: for a socket that is not connected (any more) Python before 3.11.5 makes an SSLSocket without TLS,
    whose recv() answers bytes that arrived in the clear, as if a peer had proven itself. Newer versions refuse that
    only when bytes are waiting; here it is always refused.
    """
    wrapped = context.wrap_socket(
        sock,
        server_side=server_side,
        do_handshake_on_connect=False,  # the loop does it, without blocking and under a deadline
        suppress_ragged_eofs=False,  # a cut connection is an error: only the peer may end it, with close_notify
        server_hostname=server_name,
    )
    if _tls_object(wrapped) is None:
        wrapped.close()
        raise OSError(errno.ENOTCONN, "the peer left before the handshake: accept the next connection")
    return wrapped


def verified_chain(connection: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    """The path OpenSSL verified, leaf first, DER. Empty until the handshake is done, so that nothing passes early:
    during the handshake a chain is known before the peer has proven that it holds the key.
    """
    tls = _tls_object(connection)
    if tls is None or connection.version() is None:  # version() answers only after the handshake
        return []
    if hasattr(connection, "get_verified_chain"):  # Python 3.13 and later
        return list(connection.get_verified_chain())
    # Before, the same call exists only inside; getpeercert() is public, but knows the leaf and not who vouched for it.
    return [certificate.public_bytes(_DER) for certificate in tls.get_verified_chain() or ()]


def speaks_underpass(connection: ssl.SSLSocket | ssl.SSLObject) -> bool:
    """OpenSSL goes on without ALPN when a client offers none or only others, so both sides must ask afterwards."""
    return connection.selected_alpn_protocol() == ALPN


def _tls_object(connection: ssl.SSLSocket | ssl.SSLObject) -> Any:
    return getattr(connection, "_sslobj", None)


def _context(protocol: ssl._SSLMethod, roots_pem: bytes) -> ssl.SSLContext:
    # Not ssl.create_default_context(): it trusts the system's authorities and writes session keys to $SSLKEYLOGFILE.
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # Names are compared by verify_peer and, on the client, with the identity it wanted: a host name says less.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    context.set_alpn_protocols([ALPN])
    # A resumed session skips the certificates, and so a new root, a new policy and an expiry: there is no resumption.
    context.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    # Python sets this by default, and it turns a connection cut by anybody on the path into an orderly end.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def _load_leaf(context: ssl.SSLContext, leaf: Leaf) -> None:
    """load_cert_chain() wants a path; a memfd has one, and the key never touches a file system."""
    fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(leaf.key_pem + leaf.chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
