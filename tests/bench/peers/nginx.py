"""nginx with its stream module."""

from __future__ import annotations

from tests.bench.peers.hop import Hop, Start

MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"  # where Debian's libnginx-mod-stream puts it
CHAIN_DEPTH = 2  # leaf, intermediate, root


def start(hop: Hop) -> Start:
    file = hop.directory / "nginx.conf"
    return Start(file.name, text(hop), ["nginx", "-p", str(hop.directory), "-e", "stderr", "-c", str(file)])


def text(hop: Hop) -> str:
    listen = f"listen {hop.listen_text}{'' if hop.dials_tls else ' ssl'} reuseport backlog=4096;"
    tls = "\n        ".join(_dialling(hop) if hop.dials_tls else _accepting(hop))
    # Two sockets for each connection; the workers share them unevenly, so each may have them all.
    return f"""load_module {MODULE};
daemon off;
user root;
worker_processes {hop.threads};
pid {hop.directory}/nginx.pid;
error_log stderr warn;
events {{
    worker_connections {hop.connections * 2};
}}
stream {{
    server {{
        {listen}
        proxy_pass {hop.target_text};
        proxy_timeout 1h;
        {tls}
    }}
}}
"""


def _dialling(hop: Hop) -> list[str]:
    return [
        "proxy_ssl on;",
        "proxy_ssl_protocols TLSv1.3;",
        "proxy_ssl_session_reuse off;",
        f"proxy_ssl_certificate {hop.tls.chain};",
        f"proxy_ssl_certificate_key {hop.tls.key};",
        f"proxy_ssl_trusted_certificate {hop.tls.root};",
        "proxy_ssl_verify on;",
        f"proxy_ssl_verify_depth {CHAIN_DEPTH};",
        "proxy_ssl_server_name on;",
        f"proxy_ssl_name {hop.peer_name};",
    ]


def _accepting(hop: Hop) -> list[str]:
    return [
        "ssl_protocols TLSv1.3;",
        "ssl_session_cache off;",
        "ssl_session_tickets off;",
        f"ssl_certificate {hop.tls.chain};",
        f"ssl_certificate_key {hop.tls.key};",
        f"ssl_client_certificate {hop.tls.root};",
        "ssl_verify_client on;",
        f"ssl_verify_depth {CHAIN_DEPTH};",
    ]
