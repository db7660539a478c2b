"""Which endpoints of this host applications may dial directly, without the proxies: those where nobody but the right
application would take the connection, and that are really here. Pure.

The kernel cannot ask for identities in connect(), so hooks verifies ahead of it, every second and when an address of
this host changes. What remains is a race: whoever takes over a port, allowed to by Linux and by the application that
left it, is dialled directly until the next look. Nothing that listens there at a look is ever dialled unless all of it
belongs to the right application, and without anybody who looks the kernel tunnels again after LEASE_NS.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from agent import host, netlink
from agent.records import Address
from policy.compile import Table
from policy.identity import SpiffeId
from policy.model import SameNode

LEASE_NS = 5_000_000_000  # a few missed looks, and the restart of a killed hooks process

Spot = tuple[Address, int]
Identify = Callable[[int, int], SpiffeId | None]  # of a socket, by the cgroup it was made in and its user


def candidates(table: Table | None, own_host: str) -> dict[Spot, SpiffeId]:
    """Where an application of this host has to listen, and which. Nowhere, when the policy asks for mutual TLS."""
    if table is None or table.same_node is not SameNode.DIRECT:
        return {}
    return {
        (each.address, each.port): each.answers
        for each in table.services
        if each.answers is not None and each.answers.host == own_host
    }


def here(wanted: Mapping[Spot, SpiffeId], local: Collection[Address]) -> dict[Spot, SpiffeId]:
    """Without addresses that are not this host's now: a misprint, or an address that has moved to another host. Dialled
    directly, those would leave the host without protection."""
    return {spot: identity for spot, identity in wanted.items() if spot[0] in local}


def verified(
    wanted: Mapping[Spot, SpiffeId], listeners: Iterable[netlink.Socket], identify: Identify
) -> frozenset[Spot]:
    """Where somebody listens, and everybody who could be given the connection is who it should be."""
    by_port: dict[int, list[netlink.Socket]] = defaultdict(list)
    for listener in listeners:
        by_port[listener.port].append(listener)
    found = set()
    for (address, port), identity in wanted.items():
        owners = host.owners_of(by_port.get(port, ()), address, port)
        if owners and all(identify(owner.cgroup, owner.uid) == identity for owner in owners):
            found.add((address, port))
    return frozenset(found)
