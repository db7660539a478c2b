"""What the bench tells the other proxies: TLS 1.3 with certificates on both sides, and no resumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.certificates import issue, peer_name
from tests.bench.limits import fitting
from tests.bench.peers import envoy, haproxy, nginx, stunnel
from tests.bench.peers.hop import Hop, Start, Tls

TLS = Tls(*(Path(f"/tls/{name}.pem") for name in ("root", "chain", "key", "both")))
DIALS = Hop(True, ("127.0.0.1", 7200), ("10.0.0.2", 7201), TLS, "b.bench", Path("/hop"), 2, 9000)
ACCEPTS = replace(DIALS, dials_tls=False, listen=("10.0.0.2", 7201), target=("10.0.0.2", 7100), peer_name="a.bench")

TEXTS: dict[str, Callable[[Hop], str]] = {
    "haproxy": haproxy.text,
    "nginx": nginx.text,
    "stunnel": stunnel.text,
    "envoy": lambda hop: envoy.start(hop).text,
}
BOTH_SIDES_PROVE: dict[str, list[str]] = {
    "haproxy": ["verify required", "ssl-min-ver TLSv1.3", "/tls/both.pem", "/tls/root.pem"],
    "nginx": ["TLSv1.3;", "/tls/chain.pem", "/tls/key.pem", "/tls/root.pem"],
    "stunnel": ["sslVersionMin = TLSv1.3", "verifyChain = yes", "requireCert = yes", "/tls/chain.pem", "/tls/root.pem"],
    "envoy": ['"tls_minimum_protocol_version": "TLSv1_3"', "/tls/chain.pem", "/tls/key.pem", "/tls/root.pem"],
}
NO_RESUMPTION: dict[str, tuple[list[str], list[str]]] = {
    "haproxy": (["no-ssl-reuse", "no-tls-tickets"], ["tune.ssl.cachesize 0", "no-tls-tickets"]),
    "nginx": (["proxy_ssl_session_reuse off;"], ["ssl_session_cache off;", "ssl_session_tickets off;"]),
    "stunnel": (["sessionResume = no"], ["sessionResume = no", "options = NO_TICKET"]),
    "envoy": (
        ['"max_session_keys": 0'],
        ['"disable_stateless_session_resumption": true', '"disable_stateful_session_resumption": true'],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("hop", [DIALS, ACCEPTS], ids=["dials", "accepts"])
def test_both_sides_of_a_peer_show_a_certificate_and_ask_for_one(name: str, hop: Hop) -> None:
    text = TEXTS[name](hop)
    assert [wanted for wanted in BOTH_SIDES_PROVE[name] if wanted not in text] == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_peer_resumes_a_session(name: str) -> None:
    dials, accepts = NO_RESUMPTION[name]
    assert [wanted for wanted in dials if wanted not in TEXTS[name](DIALS)] == []
    assert [wanted for wanted in accepts if wanted not in TEXTS[name](ACCEPTS)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_the_dialling_side_checks_whom_it_reached(name: str) -> None:
    assert "b.bench" in TEXTS[name](DIALS)


@pytest.mark.parametrize("name", ["haproxy", "nginx", "stunnel"])
def test_a_hop_listens_and_dials_where_it_is_told(name: str) -> None:
    assert "127.0.0.1:7200" in TEXTS[name](DIALS)
    assert "10.0.0.2:7201" in TEXTS[name](DIALS)


def test_envoy_has_tls_on_one_side_only() -> None:
    assert ["transport_socket" in part for part in _listener_and_cluster(DIALS)] == [False, True]
    assert ["transport_socket" in part for part in _listener_and_cluster(ACCEPTS)] == [True, False]


def test_envoy_may_have_as_many_connections_as_the_others() -> None:
    assert _listener_and_cluster(DIALS)[1]["circuit_breakers"]["thresholds"][0]["max_connections"] == 9000


def test_every_peer_gets_as_many_threads_as_there_are_cores() -> None:
    assert "nbthread 2" in haproxy.text(DIALS)
    assert "worker_processes 2;" in nginx.text(DIALS)
    command = envoy.start(DIALS).command
    assert command[command.index("--concurrency") + 1] == "2"


@pytest.mark.parametrize("start", [haproxy.start, nginx.start, stunnel.start, envoy.start])
def test_a_hop_reads_the_file_that_is_written_for_it(start: Callable[[Hop], Start]) -> None:
    started = start(DIALS)
    assert f"/hop/{started.file}" in started.command


def test_certificates_are_a_chain_of_three_with_one_leaf_for_each_host(tmp_path: Path) -> None:
    tls = issue(tmp_path, ("a", "b"))
    assert tls["a"].root == tls["b"].root
    assert [tls[host].chain.read_text().count("BEGIN CERTIFICATE") for host in ("a", "b")] == [2, 2]
    assert tls["a"].both.read_bytes() == tls["a"].chain.read_bytes() + tls["a"].key.read_bytes()
    assert tls["a"].key.stat().st_mode & 0o077 == 0
    assert peer_name("a") != peer_name("b")


@pytest.mark.parametrize(("descriptors", "connections"), [(20_000, 9_600), (65_536, 31_457), (1, 1)])
def test_connections_are_limited_by_descriptors(descriptors: int, connections: int) -> None:
    assert fitting(descriptors) == connections


def _listener_and_cluster(hop: Hop) -> tuple[dict[str, Any], dict[str, Any]]:
    resources = envoy.config(hop)["static_resources"]
    return resources["listeners"][0]["filter_chains"][0], resources["clusters"][0]
