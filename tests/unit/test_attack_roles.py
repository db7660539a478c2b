"""What a taken-over role, a full disk or a crowd at the admin port may cost: never the supervisor or control."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest

from agent import app, channel, runstate
from agent.admin.server import MAX_TCP, AdminServer
from agent.audit.writer import Writer
from agent.metrics import MAX_FLOWS, Metrics
from agent.outcome import Event, Outcome, Side, to_json
from agent.supervise import Supervisor


class Stage:
    """A supervisor whose roles are `sleep`; the test speaks for them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.refuse = False
        self.supervisor = Supervisor(str(run_dir), self.spawn, lambda: None)
        self.ends = {name: channel.pair(1 << 16) for name in ("control", "proxy-0")}

    def add(self, name: str) -> socket.socket:
        self.supervisor.add(name, {}, self.ends[name][1])
        return self.ends[name][0]

    def spawn(self, name: str, needs: Mapping[str, int]) -> subprocess.Popen[bytes]:
        if self.refuse:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return subprocess.Popen(["sleep", "60"])

    def turns(self, number: int = 3) -> None:
        left = iter(range(number))
        self.supervisor.run(until=lambda: next(left, None) is None)

    def role(self, name: str) -> dict[str, object]:
        return dict(runstate.read(str(self.run_dir))["roles"][name])


@pytest.fixture
def stage(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Stage(tmp_path)
    yield made
    made.supervisor.stop(0)


@pytest.mark.parametrize("nonsense", [b"", b"{", b"[]", b"7", b"\xff\xfe"])
def test_a_role_that_says_nonsense_cannot_fell_the_supervisor(stage: Stage, nonsense: bytes) -> None:
    status = stage.add("proxy-0")
    stage.turns(1)
    status.send(nonsense)
    channel.send(status, {"type": "ready"})
    stage.turns()
    assert stage.role("proxy-0")["ready"]


def test_a_role_that_never_stops_talking_does_not_keep_the_supervisor(stage: Stage) -> None:
    stage.add("proxy-0")
    with mock.patch("agent.supervise.channel.receive", return_value=({"type": "beat"}, None)):
        os.write(stage.ends["proxy-0"][0].fileno(), b"{}")
        stage.turns()


def test_a_reload_before_control_is_there_or_ready_is_no_harm(stage: Stage) -> None:
    stage.supervisor._on_reload(signal.SIGHUP, None)
    stage.add("proxy-0")
    stage.turns()
    stage.add("control")
    stage.turns(1)
    pid = stage.role("control")["pid"]
    stage.supervisor._on_reload(signal.SIGHUP, None)
    stage.turns()
    assert stage.role("control")["pid"] == pid  # `sleep` would have died of it


def test_a_run_directory_that_is_full_is_no_end(stage: Stage) -> None:
    stage.add("proxy-0")
    (stage.run_dir / "roles.new").mkdir()
    stage.turns()
    (stage.run_dir / "roles.new").rmdir()
    stage.turns()
    assert stage.role("proxy-0")["pid"]


def test_a_role_that_cannot_be_started_now_is_started_later(stage: Stage) -> None:
    stage.add("proxy-0")
    stage.refuse = True
    stage.turns()
    assert "unavailable" in str(stage.role("proxy-0")["problem"])
    stage.refuse = False
    stage.turns(8)
    assert stage.role("proxy-0")["pid"]


def test_a_role_that_dies_of_a_signal_without_a_name_is_started_again(stage: Stage) -> None:
    stage.add("proxy-0")
    stage.turns(1)
    pid = stage.role("proxy-0")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGRTMIN + 1)
    stage.turns(8)
    assert stage.role("proxy-0")["pid"] not in (0, pid)


def test_outcomes_that_were_lost_are_shown_over_all_processes_of_a_role(stage: Stage) -> None:
    status = stage.add("proxy-0")
    stage.turns(1)
    for lost in (3, 5):
        channel.send(status, {"type": "beat", "lost_outcomes": lost, "defects": 1})
    stage.turns()
    pid = stage.role("proxy-0")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    stage.turns(4)
    channel.send(status, {"type": "beat", "lost_outcomes": 2, "defects": 0})
    stage.turns(4)
    assert (stage.role("proxy-0")["lost_outcomes"], stage.role("proxy-0")["defects"]) == (7, 1)


def test_a_message_without_its_body_is_told_apart_when_descriptors_are_used_up() -> None:
    near, far = channel.pair(1 << 16)
    channel.send(near, {"type": "snapshot"}, b"body")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(near.fileno(), far.fileno()) + 1, hard))
    try:
        assert channel.receive(far) == ({"type": "snapshot"}, None)
        assert not channel.send(near, {"type": "snapshot"}, b"body")  # and is tried again by whoever sends
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_torn_line_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    writer = Writer(str(path))
    sizes = iter([5, None, None])

    def write(fd: int, data: bytes) -> int:
        size = next(sizes)
        if size is None:
            raise OSError(28, "No space left on device")
        return real(fd, data[:size])

    real = os.write
    with mock.patch("agent.audit.writer.os.write", write):
        for _ in range(3):
            writer.write({"event": "close"})
    writer.write({"event": "close"})
    torn, whole = path.read_text().splitlines()
    assert torn == '{"eve'
    assert whole == '{"event":"close","lines_lost_before":3}'


def test_the_audit_file_is_never_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        Writer(str(tmp_path / "outcomes.jsonl"))


def test_no_role_can_change_the_configuration_of_the_next() -> None:
    fd = app._keep("host: a\n")
    assert os.pread(fd, 100, 0) == b"host: a\n"
    for change in (lambda: os.write(fd, b"x"), lambda: os.ftruncate(fd, 0), lambda: fcntl.fcntl(fd, 1033, 0)):
        with pytest.raises(PermissionError):
            change()
    os.close(fd)


def test_a_crowd_at_the_admin_port_is_bounded_and_the_operators_socket_answers(tmp_path: Path) -> None:
    asyncio.run(_crowd(tmp_path))


async def _crowd(tmp_path: Path) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    server = AdminServer(lambda: {"ready": True}, lambda: b"", "text/plain")
    await server.start(listening, str(tmp_path / "admin.sock"))
    crowd = [await asyncio.open_connection(*listening.getsockname()) for _ in range(MAX_TCP + 40)]
    ended = [reader for reader, _ in crowd if await _ends(reader)]
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "admin.sock"))
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    answer = await reader.read()
    for _, one in [*crowd, (reader, writer)]:
        one.close()
    await server.stop()
    assert len(ended) == 40
    assert b'{"ok": true}' in answer


async def _ends(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 0.05) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize("verdict", ["deny", "allow"])
def test_names_that_a_stolen_host_makes_up_do_not_become_series_without_end(verdict: str) -> None:
    metrics = Metrics()
    for number in range(MAX_FLOWS + 50):
        told = Outcome(
            event=Event.CLOSE, time=0.0, host="b", side=Side.DESTINATION, source=f"spiffe://demo.bank/a/x{number}",
            destination="spiffe://demo.bank/b/lab", service=f"zz{number}", verdict=verdict, reason="denied",
        )  # fmt: skip
        metrics.observe(to_json(told))
    series = [line for line in metrics.render().decode().splitlines() if line.startswith("underpass_flows_total")]
    assert len(series) == (1 if verdict == "deny" else MAX_FLOWS + 1)
