"""Where a dialled address leads, on the source's and on the destination's side."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.route import NoRoute, Route, Routes
from policy.identity import SpiffeId
from policy.load import load_directory

SERVICES = """
hosts:
  a: {tunnel: "10.0.0.1:15008"}
  b: {tunnel: "10.0.0.2:15008"}
services:
  core-db:
    application: postgres
    ports: [5432]
    endpoints: [{host: b, address: 10.0.0.2}]
  lab:
    application: lab
    ports: ["9000-9010"]
    endpoints: [{host: a, address: 10.0.0.1}, {host: b, address: 10.0.0.2}]
    addresses: [10.99.0.1]
"""


@pytest.fixture
def routes() -> Routes:
    return Routes(load_directory(SERVICES, "services.yaml"), "demo.bank")


def test_an_endpoints_own_address_leads_to_that_endpoint(routes: Routes) -> None:
    for _ in range(3):
        route = routes.to(ip_address("10.0.0.1"), 9003)
        assert isinstance(route, Route)
        assert route.destination.short == "a/lab"
        assert route.tunnel == (ip_address("10.0.0.1"), 15008)


def test_endpoints_behind_a_virtual_address_take_turns(routes: Routes) -> None:
    found = [routes.to(ip_address("10.99.0.1"), 9000) for _ in range(4)]
    assert [route.destination.host for route in found if isinstance(route, Route)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("address", "port"), [("10.0.0.2", 5433), ("10.0.0.9", 5432), ("10.99.0.1", 8999)])
def test_what_no_service_has_leads_nowhere(routes: Routes, address: str, port: int) -> None:
    assert isinstance(routes.to(ip_address(address), port), NoRoute)


@pytest.mark.parametrize(
    ("identity", "service", "address", "port", "served"),
    [
        ("b/postgres", "core-db", "10.0.0.2", 5432, True),
        ("b/lab", "core-db", "10.0.0.2", 5432, False),  # another application of the same host
        ("a/postgres", "core-db", "10.0.0.2", 5432, False),  # the right application, another host
        ("b/postgres", "core-db", "10.0.0.3", 5432, False),
        ("b/postgres", "core-db", "10.0.0.2", 22, False),  # a port of this host that the service does not have
        ("b/postgres", "nothing", "10.0.0.2", 5432, False),
        ("b/lab", "lab", "10.99.0.1", 9010, True),
        ("b/lab", "lab", "10.0.0.1", 9010, False),  # the other endpoint's address
    ],
)
def test_only_what_the_named_identity_serves_here_is_delivered(
    routes: Routes, identity: str, service: str, address: str, port: int, served: bool
) -> None:
    host, application = identity.split("/")
    found = routes.here(SpiffeId("demo.bank", host, application), service, ip_address(address), port)
    assert isinstance(found, Route) == served
