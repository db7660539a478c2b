"""The harness itself: it makes what it says, processes land where they should, and nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.terminal import PAN
from tests.world import cgroup, names, netns
from tests.world.cleanup import cleanup, leftovers
from tests.world.place import PIPE, PYTHON, spawn
from tests.world.place import run as run_at
from tests.world.wait import until
from tests.world.world import World

NAME = f"test-world-{os.getpid()}"
FACTS = """
import json, os
print(json.dumps({
    "netns": os.stat("/proc/self/ns/net").st_ino, "ipc": os.stat("/proc/self/ns/ipc").st_ino,
    "cgroup": open("/proc/self/cgroup").read(), "uid": os.getuid(), "gid": os.getgid(),
}))
"""


@pytest.fixture
def world() -> Iterator[World]:
    with World(NAME) as made:
        yield made
    assert leftovers(NAME) == []


def test_two_hosts_reach_each_other_over_both_families(world: World) -> None:
    for there in (world.b.v4, world.b.v6):
        dial = f"import socket; socket.create_connection(({there!r}, 1), timeout=5)"
        assert "ConnectionRefusedError" in world.a.run("ledger", [PYTHON, "-c", dial]).stderr


def test_enter_places_a_process_in_namespace_cgroup_and_user(world: World) -> None:
    place = world.b.place("ledger", user="nobody", own_ipc=True)
    facts = json.loads(run_at(place, [PYTHON, "-c", FACTS]).stdout)
    assert facts["netns"] == netns.path(world.b.end.netns).stat().st_ino
    assert facts["ipc"] != Path("/proc/self/ns/ipc").stat().st_ino
    assert f"0::/underpass-{NAME}/b/ledger\n" in facts["cgroup"]
    assert (facts["uid"], facts["gid"]) == (65534, 65534)


def test_enter_leaves_root_and_ipc_alone_unless_asked(world: World) -> None:
    facts = json.loads(world.a.run("ledger", [PYTHON, "-c", FACTS]).stdout)
    assert facts["uid"] == 0
    assert facts["ipc"] == Path("/proc/self/ns/ipc").stat().st_ino


def test_enter_passes_input_output_and_status(world: World) -> None:
    done = world.a.run("ledger", ["sh", "-c", "cat; exit 7"], stdin="through")
    assert (done.stdout, done.returncode) == ("through", 7)


def test_enter_says_in_one_line_what_it_cannot_start(world: World) -> None:
    done = world.a.run("ledger", ["/no/such/program"])
    assert done.returncode == 127
    assert done.stderr.startswith("enter: cannot start /no/such/program: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_a_crashed_run_left_is_swept_by_its_name() -> None:
    crashed = World(NAME)
    crashed.__enter__()
    deep = cgroup.make(crashed.a.cgroup / "ledger" / "deeper")
    process = spawn(crashed.a.place("ledger/deeper"), ["sleep", "1000"])
    subprocess.run(["mount", "-t", "bpf", "none", str(_made(crashed.a.directory / "bpf"))], check=True)
    until(lambda: cgroup.processes(deep) == [process.pid], 5, "the process in its cgroup")
    cleanup(NAME)
    assert leftovers(NAME) == []
    assert process.wait(5) == -9
    cleanup(NAME)  # and again, with nothing there


def test_a_world_of_the_same_name_can_be_made_again_at_once() -> None:
    for _ in range(2):
        with World(NAME) as made:
            made.a.run("ledger", ["true"])
    assert leftovers(NAME) == []


def test_a_failure_inside_leaves_nothing() -> None:
    def fail() -> None:
        with World(NAME) as made:
            spawn(made.b.place("switch"), ["sleep", "1000"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert leftovers(NAME) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "-", "UP"])
def test_names_that_could_point_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name"):
        cleanup(name)


def test_only_cgroups_of_worlds_are_ever_touched() -> None:
    for path in (names.cgroup_mount(), names.cgroup_mount() / "system.slice", Path("/tmp")):
        with pytest.raises(ValueError):
            cgroup.remove(path)


def test_without_underpass_the_wire_shows_everything(world: World) -> None:
    """The negative test of the proof: the same judge that must find nothing later finds plaintext here."""
    capture = world.capture()
    address = f"{world.b.v4}:8583"
    with world.b.spawn("switch", [PYTHON, "-m", "tests.apps.switch", "--listen", address], stdout=PIPE) as switch:
        assert switch.stdout is not None
        switch.stdout.readline()
        done = world.a.run("terminal", [PYTHON, "-m", "tests.apps.terminal", "--connect", address, "--count", "20"])
        peer = json.loads(switch.stdout.readline())["peer"]
        switch.terminate()
    report = capture.finish([PAN.encode(), b"not there"])
    result = json.loads(done.stdout)
    assert (result["authorisations"], result["network_messages"]) == (18, 3)
    assert (result["local"], result["peer"]) == (peer, address)
    assert report.dropped == 0
    assert report.needles == [PAN.encode()]
    assert report.plaintext_bytes > 20 * 200
    assert report.tls13_connections == 0
    assert report.foreign > 40


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("size", [200, 300_000])
def test_echo_works_over_a_plain_wire(world: World, family: str, size: int) -> None:
    host = world.b.v4 if family == "v4" else f"[{world.b.v6}]"
    with world.b.spawn(
        "lab", [PYTHON, "-m", "tests.apps.echo", "serve", "--listen", f"{host}:9000"], stdout=PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        client = [PYTHON, "-m", "tests.apps.echo", "client", "--connect", f"{host}:9000", "--json"]
        done = world.a.run("lab", [*client, "--count", "5", "--size", str(size)])
        server.terminate()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == 6 * size


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
