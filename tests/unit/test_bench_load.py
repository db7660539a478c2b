"""The load generator and the echo server, compiled and let loose on each other over loopback for a moment."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bench.build import Programs, compile_programs

WITHIN_S = 20


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return compile_programs(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def server(programs: Programs) -> Iterator[str]:
    address = f"127.0.0.1:{_free_port()}"
    with subprocess.Popen([str(programs.echo), address], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"event": "listening"}
        yield address
        process.kill()


def load(programs: Programs, *arguments: str) -> list[dict[str, Any]]:
    command = [str(programs.load), *arguments]
    nothing = subprocess.DEVNULL
    done = subprocess.run(command, stdin=nothing, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["rr", "fixed", "cps"])
def test_requests_are_counted_and_their_latencies_ranked(programs: Programs, server: str, mode: str) -> None:
    options = ("connections=4", "size=1024", "seconds=0.1", "warmup=0.02", "rate=1000")
    started, done = load(programs, mode, f"to={server}", *options)
    assert started == {"event": "started"}
    assert (done["event"], done["errors"]) == ("done", 0)
    assert done["requests"] > 10
    assert done["min_us"] <= done["p50_us"] <= done["p99_us"] <= done["p999_us"] <= done["max_us"]


def test_a_fixed_rate_is_kept(programs: Programs, server: str) -> None:
    *_, done = load(programs, "fixed", f"to={server}", "connections=16", "rate=1000", "seconds=0.3", "warmup=0.02")
    assert done["requests"] == pytest.approx(300, abs=60)


def test_bulk_counts_what_arrived(programs: Programs, server: str) -> None:
    *_, done = load(programs, "bulk", f"to={server}", "connections=2", "seconds=0.1")
    assert done["bytes"] > 1_000_000
    assert done["seconds"] >= 0.1


def test_idle_connections_are_held_until_standard_input_ends(programs: Programs, server: str) -> None:
    started, done = load(programs, "idle", f"to={server}", "connections=100", "seconds=5")
    assert (started["event"], done["requests"]) == ("started", 100)


def test_connects_are_timed_one_by_one(programs: Programs, server: str) -> None:
    *_, done = load(programs, "connect", f"to={server}", "count=50")
    assert done["requests"] == 50


@pytest.mark.parametrize("mode", ["rr", "fixed", "bulk", "idle", "connect", "cps"])
def test_a_server_that_is_not_there_is_an_error_with_its_reason(programs: Programs, mode: str) -> None:
    *_, last = load(programs, mode, f"to=127.0.0.1:{_free_port()}", "seconds=0.1")
    assert last["event"] == "error"
    assert "refused" in last["text"]


def test_a_server_that_ends_the_connection_is_an_error(programs: Programs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [str(programs.load), "rr", f"to=127.0.0.1:{listener.getsockname()[1]}", "seconds=5"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            connection.recv(200)
            connection.close()
            said, _ = process.communicate(timeout=WITHIN_S)
    assert json.loads(said.splitlines()[-1])["event"] == "error"


@pytest.mark.parametrize("arguments", [["rr"], ["rr", "to=nowhere"], ["dance", "to=127.0.0.1:1"], ["rr", "size=0"]])
def test_wrong_usage_is_refused(programs: Programs, arguments: list[str]) -> None:
    assert subprocess.run([str(programs.load), *arguments], capture_output=True, check=False).returncode == 2


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
