"""The demo's two hosts: which applications there are, what they may do, and the servers on host b."""

from __future__ import annotations

import json
import subprocess

from tests.demo.postgres import Postgres
from tests.world.host import Host
from tests.world.mesh import Mesh
from tests.world.place import PIPE, PYTHON
from tests.world.world import World

NAME = "demo"
POSTGRES_PORT, SWITCH_PORT, LAB_PORT = 5432, 8583, 9000
DENY_RULE = "batch-stays-away"

APPLICATIONS = {
    "a": ("ledger", "terminal", "batch", "intruder", "lab"),
    "b": ("postgres", "switch", "lab"),
}
_LAB_ENDPOINTS = [("a", "10.77.0.1"), ("b", "10.77.0.2"), ("a", "fd77::1"), ("b", "fd77::2")]
SERVICES = {
    "core-db": {
        "application": "postgres",
        "ports": [POSTGRES_PORT],
        "endpoints": [{"host": "b", "address": "10.77.0.2"}],
    },
    "auth-switch": {
        "application": "switch",
        "ports": [SWITCH_PORT],
        "endpoints": [{"host": "b", "address": "10.77.0.2"}],
    },
    "lab": {
        "application": "lab",
        "ports": ["9000-9010"],
        "endpoints": [{"host": host, "address": address} for host, address in _LAB_ENDPOINTS],
    },
}
RULES = [
    {"name": "ledger-reads-core", "allow": {"from": ["a/ledger"], "to": ["core-db"]}},
    {"name": "terminal-authorises", "allow": {"from": ["a/terminal"], "to": ["auth-switch"]}},
    {"name": "lab-reaches-lab", "allow": {"from": ["*/lab"], "to": ["lab"]}},
    {"name": DENY_RULE, "deny": {"from": ["a/batch"], "to": ["core-db"]}},
]
MESH = Mesh(APPLICATIONS, SERVICES, RULES)


def start_servers(world: World) -> Postgres:
    """PostgreSQL and the authorisation switch on host b, as they run without Underpass."""
    postgres = Postgres(world.b, POSTGRES_PORT)
    postgres.start()
    listening(world.b, "switch", "tests.apps.switch", "--listen", f"{world.b.v4}:{SWITCH_PORT}")
    return postgres


def listening(host: Host, application: str, module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a server of tests/apps and wait until it says that it listens. Later lines name its clients."""
    server = host.spawn(application, [PYTHON, "-m", module, *arguments], stdout=PIPE)
    first = next_line(server)
    if "listening" not in first:
        raise OSError(f"{module} did not start on host {host.name}")
    return server


def next_line(server: subprocess.Popen[str]) -> dict[str, str]:
    assert server.stdout is not None
    line = server.stdout.readline()
    return dict(json.loads(line)) if line else {}
