"""HAProxy in TCP mode."""

from __future__ import annotations

from tests.bench.peers.hop import Hop, Start


def start(hop: Hop) -> Start:
    file = hop.directory / "haproxy.cfg"
    return Start(file.name, text(hop), ["haproxy", "-db", "-q", "-f", str(file)])


def text(hop: Hop) -> str:
    # No tickets, no session cache, no reuse: a full handshake with both certificates each time, as ours does it.
    tls = f"ssl crt {hop.tls.both} ca-file {hop.tls.root} verify required"
    bind, server = f"bind {hop.listen_text}", f"server next {hop.target_text}"
    if hop.dials_tls:
        server += f" {tls} sni str({hop.peer_name}) verifyhost {hop.peer_name} no-ssl-reuse"
    else:
        bind += f" {tls}"
    return f"""global
    nbthread {hop.threads}
    maxconn {hop.connections}
    tune.ssl.cachesize 0
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
frontend in
    {bind}
    default_backend out
backend out
    {server}
"""
