"""Attacks on a whole agent: what local users, peers and accidents may reach, and what must go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import privileges
from tests.demo.stage import MESH, listening
from tests.world.host import Host
from tests.world.place import PIPE, PYTHON, spawn
from tests.world.wait import until
from tests.world.world import World

NAME = f"attack-{os.getpid()}"
DIAL = "import socket; s = socket.create_connection(('10.77.0.2', 9000), 8); s.sendall(b'x'); print(s.recv(1))"
# Host a's intermediate in the wrong hands: a tunnel that never opens a stream costs host b a descriptor.
HOLD = """
import socket, sys, time
from pathlib import Path
from agent.certs.authority import make_leaf
from agent.certs.contexts import client_context
from agent.certs.store import load_host
from policy.identity import SpiffeId
own = load_host(Path(sys.argv[1]), "a", "demo.bank", time.time())
leaf = make_leaf(own.intermediate, SpiffeId("demo.bank", "a", "lab"), time.time())
context = client_context(leaf, own.roots_pem)
held = []
try:
    while len(held) < 200:
        sock = socket.create_connection(("10.77.0.2", 15008), 2)
        held.append(context.wrap_socket(sock, server_hostname="lab.b.demo.bank"))
except OSError:
    pass
print(len(held), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(NAME) as made:
        made.deploy(MESH)
        made.start()
        listening(made.b, "lab", "tests.apps.echo", "serve", "--listen", f"{made.b.v4}:9000")
        yield made


def works(world: World) -> bool:
    return world.a.run("lab", [PYTHON, "-c", DIAL]).stdout == "b'x'\n"


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_every_role_has_given_up_what_it_does_not_need(world: World) -> None:
    for name, pid in world.a.role_pids().items():
        found = status_of(pid)
        kept = sum(1 << number for number in privileges.HOOKS) if name == "hooks" else 0
        assert found["NoNewPrivs"] == "1"
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            allowed = kept if name == "hooks" or kind != "CapBnd" else 0
            assert int(found[kind], 16) & ~allowed == 0, (name, kind)


def test_what_others_could_misuse_is_not_theirs(world: World) -> None:
    lock = world.a.directory / "run" / "lock"
    assert lock.stat().st_mode & 0o777 == 0o600  # flock(2) needs no more than a descriptor
    audit = world.a.outcomes_file.stat()
    assert (audit.st_uid, audit.st_mode & 0o777) == (0, 0o640)


def test_a_half_edited_configuration_is_not_met_by_a_role_that_restarts(world: World) -> None:
    good = world.a.config_file.read_text()
    world.a.config_file.write_text("host: [\n")
    try:
        pid = supervised(world.a)["control"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: supervised(world.a)["control"] not in (0, pid), 15, "another control")
        assert works(world)
    finally:
        world.a.config_file.write_text(good)
    world.a.wait_ready()


def supervised(host: Host) -> dict[str, int]:
    """Not through `underpass status`, which reads the configuration."""
    state: dict[str, Any] = yaml.safe_load((host.directory / "run" / "roles.json").read_text())
    return {name: role["pid"] if role["ready"] else 0 for name, role in state["roles"].items()}


def test_the_admin_port_cannot_be_taken_while_control_restarts(world: World) -> None:
    os.kill(world.a.role_pids()["control"], signal.SIGKILL)
    take = "import socket; s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('127.0.0.1', 15090)); s.listen()"
    done = subprocess.run(
        ["ip", "netns", "exec", world.a.end.netns, PYTHON, "-c", take], capture_output=True, text=True, check=False
    )
    assert "Address already in use" in done.stderr
    world.a.wait_ready()


def test_a_revocation_takes_effect_while_a_peer_holds_every_descriptor(world: World) -> None:
    policy = world.b.directory / "policy.d" / "policy.yaml"
    good = policy.read_text()
    client = world.a.spawn("lab", [PYTHON, "-c", f"{DIAL}; import time; print(s.recv(1))"], stdout=PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == "b'x'\n"
    limit_descriptors(world.b.role_pids()["proxy-0"], 64)
    holder = spawn(world.outside(world.a), [PYTHON, "-c", HOLD, str(world.a.directory / "ca")], stdout=PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        policy.write_text(good.replace("lab-reaches-lab\n  allow:", "lab-reaches-lab\n  deny:"))
        assert client.wait(10) != 0  # reset: the live stream was reviewed
    finally:
        holder.kill()
        holder.wait()
    time.sleep(0.5)
    assert not works(world)
    policy.write_text(good)
    until(lambda: works(world), 10, "the policy of before")


def limit_descriptors(pid: int, number: int) -> None:
    """As the role's own user: root would need CAP_SYS_RESOURCE for another's."""
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    subprocess.run([*user, "prlimit", f"--nofile={number}", "--pid", str(pid)], check=True)


def test_a_stranger_learns_nothing_at_the_tunnel_port(world: World) -> None:
    place = world.outside(world.a)
    dial = (
        "import socket, ssl; c = ssl._create_unverified_context(); c.set_alpn_protocols(['underpass/1']);"
        "t = c.wrap_socket(socket.create_connection(('10.77.0.2', 15008), 5), server_hostname='lab.b.demo.bank');"
        "t.recv(1)"
    )
    with spawn(place, [PYTHON, "-c", dial], stderr=PIPE) as stranger:
        assert stranger.stderr is not None
        assert "certificate required" in stranger.stderr.read()
    assert works(world)
