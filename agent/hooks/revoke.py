"""Direct connections that a changed policy no longer allows. No proxy holds them, so hooks finds and cuts them. Pure.

Whom they belong to is told by the cgroup and the user of the dialling socket, as it was in connect(). Only what the
policy before allowed and this one denies is cut: what it never allowed was not made under our eyes, and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent import netlink
from agent.hooks.local import Identify, Spot
from policy.compile import CapturedAddress, Table
from policy.evaluate import decide
from policy.model import Policy, Request, SameNode, Verdict


def revoked(
    connections: Iterable[netlink.Socket],
    table: Table,
    before: Policy | None,
    after: Policy | None,
    trust_domain: str,
    identify: Identify,
) -> list[netlink.Socket]:
    """`table` is the one in force before, and tells what the addresses meant then."""
    if table.same_node is not SameNode.DIRECT or before == after:
        return []
    spots: dict[Spot, CapturedAddress] = {(each.address, each.port): each for each in table.services if each.answers}
    found = []
    for connection in connections:
        spot = spots.get((connection.peer, connection.peer_port))
        source = identify(connection.cgroup, connection.uid) if spot else None
        if spot is None or spot.answers is None or source is None:
            continue
        request = Request(source, spot.answers, table.service_names[spot.service_id], spot.port)
        was, now = (decide(policy, trust_domain, request).verdict for policy in (before, after))
        if was is Verdict.ALLOW and now is Verdict.DENY:
            found.append(connection)
    return found
