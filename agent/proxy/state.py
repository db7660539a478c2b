"""A snapshot made ready for use: parsed policy, routes, TLS contexts. Built whole or not at all, then swapped."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from agent.certs.authority import Leaf
from agent.certs.contexts import ServerContexts, client_context
from agent.route import Routes
from agent.snapshot import LeafText, Snapshot
from policy.identity import SpiffeId, parse_uri
from policy.load import load_directory, load_policies
from policy.model import Policy


@dataclass(frozen=True, slots=True)
class State:
    """What every decision of this worker rests on until the next snapshot."""

    generation: int
    leaf_generation: int  # of the snapshot that last changed the certificates or roots
    policy: Policy
    routes: Routes
    clients: dict[SpiffeId, ssl.SSLContext]
    servers: ServerContexts


def build(snapshot: Snapshot, trust_domain: str, old: State | None, old_snapshot: Snapshot | None) -> State:
    """ValueError (Invalid, CertError) or ssl.SSLError when anything in it is wrong; the old state then stays."""
    directory = load_directory(snapshot.services[1], snapshot.services[0])
    policy = load_policies(snapshot.policies)
    same_leaves = (
        old is not None
        and old_snapshot is not None
        and (old_snapshot.leaves, old_snapshot.roots_pem) == (snapshot.leaves, snapshot.roots_pem)
    )
    if same_leaves and old is not None:
        clients, servers, leaf_generation = old.clients, old.servers, old.leaf_generation
    else:
        leaves = [_leaf(text) for text in snapshot.leaves]
        roots = snapshot.roots_pem.encode()
        clients = {leaf.identity: client_context(leaf, roots) for leaf in leaves}
        servers, leaf_generation = ServerContexts(leaves, roots), snapshot.generation
    return State(snapshot.generation, leaf_generation, policy, Routes(directory, trust_domain), clients, servers)


def _leaf(text: LeafText) -> Leaf:
    return Leaf(
        identity=parse_uri(text.identity),
        chain_pem=text.chain_pem.encode(),
        key_pem=text.key_pem.encode(),
        not_before=text.not_before,
        not_after=text.not_after,
        serial=text.serial,
    )
