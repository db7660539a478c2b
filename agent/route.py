"""Where a dialled address leads: service, endpoint, the identity that must answer there. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import count

from policy.fields import IPAddress, SocketAddress
from policy.identity import SpiffeId
from policy.model import Directory, Endpoint, Service


@dataclass(frozen=True, slots=True)
class Route:
    """`tunnel` is where the endpoint's host takes tunnels."""

    service: Service
    endpoint: Endpoint
    destination: SpiffeId
    tunnel: SocketAddress


@dataclass(frozen=True, slots=True)
class NoRoute:
    reason: str


class Routes:
    """Answers for one directory; replaced whole with it."""

    def __init__(self, directory: Directory, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._turn = count()
        self._by_address: dict[IPAddress, list[Service]] = defaultdict(list)
        for service in directory.services.values():
            for address in service.captured:
                self._by_address[address].append(service)
        self._hosts: dict[IPAddress, set[str]] = defaultdict(set)
        for host in directory.hosts.values():
            self._hosts[host.tunnel[0]].add(host.name)
        for service in directory.services.values():
            for endpoint in service.endpoints:
                self._hosts[endpoint.address].add(endpoint.host)

    def to(self, address: IPAddress, port: int) -> Route | NoRoute:
        """The route for an application that dialled `address`:`port`. Endpoints behind a virtual address take turns."""
        service = next(
            (s for s in self._by_address.get(address, ()) if any(port in range_ for range_ in s.ports)), None
        )
        if service is None:
            return NoRoute(f"no service has {address} port {port}; it was removed after the kernel captured it")
        own = [endpoint for endpoint in service.endpoints if endpoint.address == address]
        choices = own or service.endpoints
        if not choices:
            return NoRoute(f"service {service.name} has no endpoint; add one to the services file")
        endpoint = choices[next(self._turn) % len(choices)]
        tunnel = self._directory.hosts[endpoint.host].tunnel
        return Route(service, endpoint, service.identity(endpoint, self._trust_domain), tunnel)

    def hosts_of(self, address: IPAddress) -> frozenset[str]:
        """The hosts that are known to have this address; none for an address that the directory does not mention."""
        return frozenset(self._hosts.get(address, ()))

    def here(self, destination: SpiffeId, service_name: str, address: IPAddress, port: int) -> Route | NoRoute:
        """On the destination's own host: is this service, under this address, served here by this identity?"""
        service = self._directory.services.get(service_name)
        if service is None:
            return NoRoute(f"service {service_name} is not known here")
        if not any(port in range_ for range_ in service.ports):
            return NoRoute(f"service {service_name} has no port {port}")
        for endpoint in service.endpoints:
            dialled = address == endpoint.address or address in service.addresses
            if dialled and service.identity(endpoint, self._trust_domain) == destination:
                return Route(service, endpoint, destination, self._directory.hosts[endpoint.host].tunnel)
        return NoRoute(f"service {service_name} is not served by {destination.short} at {address}")
