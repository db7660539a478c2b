"""stunnel: one thread for each connection."""

from __future__ import annotations

from tests.bench.peers.hop import Hop, Start


def start(hop: Hop) -> Start:
    file = hop.directory / "stunnel.conf"
    return Start(file.name, text(hop), ["stunnel4", str(file)])


def text(hop: Hop) -> str:
    check = f"\ncheckHost = {hop.peer_name}\nsni = {hop.peer_name}" if hop.dials_tls else ""
    return f"""foreground = yes
pid =
debug = 4
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1

[hop]
client = {"yes" if hop.dials_tls else "no"}
accept = {hop.listen_text}
connect = {hop.target_text}
sslVersionMin = TLSv1.3
options = NO_TICKET
sessionResume = no
cert = {hop.tls.chain}
key = {hop.tls.key}
CAfile = {hop.tls.root}
verifyChain = yes
requireCert = yes{check}
"""
