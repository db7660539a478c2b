"""Envoy with its tcp_proxy filter. Its configuration may be JSON, which needs no quoting rules of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.bench.peers.hop import Hop, Start

_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_TCP_PROXY = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"


def start(hop: Hop) -> Start:
    file = hop.directory / "envoy.json"
    options = ["--concurrency", str(hop.threads), "--disable-hot-restart", "--log-level", "warn"]
    return Start(file.name, json.dumps(config(hop), indent=1), [str(program()), "-c", str(file), *options])


def program() -> Path:
    """The wheel puts its command beside the interpreter."""
    return Path(sys.executable).with_name("envoy")


def config(hop: Hop) -> dict[str, Any]:
    return {"static_resources": {"listeners": [_listener(hop)], "clusters": [_cluster(hop)]}}


def _listener(hop: Hop) -> dict[str, Any]:
    proxy = {"@type": _TCP_PROXY, "stat_prefix": "hop", "cluster": "next", "idle_timeout": "3600s"}
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
    if not hop.dials_tls:
        chain["transport_socket"] = _socket(
            "DownstreamTlsContext",
            {
                "common_tls_context": _common(hop),
                "require_client_certificate": True,
                "disable_stateless_session_resumption": True,
                "disable_stateful_session_resumption": True,
            },
        )
    return {"name": "in", "address": _address(hop.listen), "filter_chains": [chain], "tcp_backlog_size": 4096}


def _cluster(hop: Hop) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(hop.target)}}
    # Its default is 1,024 connections to one cluster.
    limits = {"max_connections": hop.connections, "max_pending_requests": hop.connections}
    cluster = {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if hop.dials_tls:
        context = {"common_tls_context": _common(hop), "sni": hop.peer_name, "max_session_keys": 0}
        cluster["transport_socket"] = _socket("UpstreamTlsContext", context)
    return cluster


def _common(hop: Hop) -> dict[str, Any]:
    names = [{"san_type": "DNS", "matcher": {"exact": hop.peer_name}}]
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {"certificate_chain": {"filename": str(hop.tls.chain)}, "private_key": {"filename": str(hop.tls.key)}}
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(hop.tls.root)},
            "match_typed_subject_alt_names": names,
        },
    }


def _socket(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": f"{_TLS}.{kind}", **config}}


def _address(address: tuple[str, int]) -> dict[str, Any]:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}
