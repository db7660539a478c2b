"""Attaching, adopting, replacing and removing: exactly one of each program, whatever happened before."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from agent import bpfcall, host, records
from agent.hooks import attach, commands, pins, source, state
from agent.hooks.compile import compile_programs
from agent.hooks.keeper import Keeper
from agent.hooks.problem import Problem
from agent.records import VerdictKind
from tests.host.conftest import NewKernel
from tests.host.kernel_fixture import CAPTURE_PORT, V4, Kernel, install, wait_until

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _LINK_DETACH = 5, 8, 9, 34
_CONNECT4 = source.PROGRAMS["connect4"]


def attached(kernel: Kernel, cgroup: str = "") -> dict[str, int]:
    """How many programs, whosever, each hook of a cgroup has."""
    fd = os.open(f"{kernel.mount}{kernel.path}/{cgroup}", os.O_RDONLY)
    try:
        return {name: len(bpfcall.attached_programs(fd, hook.attach_type)) for name, hook in source.PROGRAMS.items()}
    finally:
        os.close(fd)


ONE_OF_EACH = dict.fromkeys(source.PROGRAMS, 1)
NONE = dict.fromkeys(source.PROGRAMS, 0)


def links(kernel: Kernel) -> dict[str, bpfcall.LinkInfo]:
    return attach.pinned_links(pins.Pins(Path(kernel.config.bpffs)))


def install_refused(kernel: Kernel, cgroup: str = "agent") -> str:
    """The text of the Problem that installing ends in."""

    def body() -> str:
        try:
            install(kernel.site())
        except Problem as problem:
            return str(problem)
        return "it was installed"

    return str(kernel.run(body, cgroup))


def foreign_program() -> int:
    """Another tool's connect4 program, which allows everything: r0 = 1; exit."""
    code = struct.pack("=BBHiBBHi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)
    code_buffer, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    at, by = ctypes.addressof(code_buffer), ctypes.addressof(licence)
    # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags, name, ifindex, type
    body = struct.pack(
        "=IIQQIIQII16sII", _CONNECT4.program_type, 2, at, by, 0, 0, 0, 0, 0, b"foreign", 0, _CONNECT4.attach_type
    )
    return bpfcall._call(_PROG_LOAD, body)


@pytest.fixture
def foreign() -> Iterator[int]:
    fd = foreign_program()
    yield fd
    os.close(fd)


def test_installing_again_adopts_what_is_there(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    assert attached(kernel) == ONE_OF_EACH
    before = links(kernel)
    for _ in range(3):
        kernel.install()
    assert attached(kernel) == ONE_OF_EACH
    assert links(kernel) == before, "same links, same programs: nothing was compiled or attached again"


def test_an_upgrade_swaps_programs_under_their_links_without_a_gap(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    kernel.protect(V4, 4000, service=4000)
    kernel.judge(4000, VerdictKind.DENY, rule=1)
    before, maps_before = links(kernel), {name: bpfcall.map_info(kernel.map(name).fd).id for name in pins.layouts(1)}

    def server(talk: Connection) -> None:
        with socket.create_server((V4, 4000)):
            talk.send("listening")
            talk.recv()

    def probe(talk: Connection) -> dict[int, int]:
        seen: dict[int, int] = {}
        talk.send("probing")
        while not talk.poll():
            with socket.socket() as sock:
                error = sock.connect_ex((V4, 4000))
            seen[error] = seen.get(error, 0) + 1
        return seen

    far, prober = kernel.start(server, "server"), kernel.start(probe)
    far.receive()
    prober.receive()
    _pretend_upgrade(kernel)
    kernel.install()
    prober.talk.send("enough")
    seen = prober.result()
    far.talk.send("enough")
    after = links(kernel)
    assert attached(kernel) == ONE_OF_EACH
    assert {name: link.id for name, link in after.items()} == {name: link.id for name, link in before.items()}
    assert all(after[name].program != before[name].program for name in after)
    assert {name: bpfcall.map_info(kernel.map(name).fd).id for name in maps_before} == maps_before
    assert seen.keys() == {errno.EPERM}, f"a protected connect got through: {seen}"
    assert seen[errno.EPERM] > 100


def _pretend_upgrade(kernel: Kernel) -> None:
    found = state.load(Path(kernel.config.state_dir), host.boot_id())
    assert found is not None
    state.save(Path(kernel.config.state_dir), replace(found, digest="of the version before"))


class Precompiled:
    """Stands for a compilation whose result is at hand, so that many starts take no time."""

    def __init__(self, kernel: Kernel) -> None:
        where = pins.Pins(Path(kernel.config.bpffs))
        self.where = where
        self.programs = {name: bpfcall.get(str(where.programs / name)) for name in source.PROGRAMS}
        self.maps = {name: bpfcall.get(str(where.map(name))) for name in pins.layouts(1)}

    def wait(self) -> None:
        for name, fd in self.maps.items():
            if not self.where.map(name).exists():
                bpfcall.pin(fd, str(self.where.map(name)))
        self.where.staging.mkdir(exist_ok=True)
        for name, fd in self.programs.items():
            bpfcall.pin(fd, str(self.where.staging / name))

    def close(self) -> None:
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)

    def compile(self, keeper: Keeper) -> Precompiled:
        attach.clear(self.where.staging)
        return self


def test_killed_at_any_step_the_next_start_has_exactly_one_of_each(
    new_kernel: NewKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = new_kernel()
    kernel.install()
    precompiled = Precompiled(kernel)
    monkeypatch.setattr(Keeper, "compile", lambda keeper: precompiled.compile(keeper))
    steps = 0
    for start in ("first", "upgrade"):
        for step in range(200):
            commands.hooks_remove(kernel.config)
            if start == "upgrade":
                kernel.install()
                _pretend_upgrade(kernel)
            victim = kernel.start(lambda _talk, step=step: _install_killed_at(kernel, step), "agent")  # type: ignore[misc]
            if victim.wait() != signal.SIGKILL:
                break
            steps += 1
            kernel.install()
            assert attached(kernel) == ONE_OF_EACH, f"{start} start killed at step {step}"
            assert links(kernel).keys() == source.PROGRAMS.keys()
            assert not pins.Pins(Path(kernel.config.bpffs)).staging.exists()
        else:
            pytest.fail("never came to the end")
    assert steps > 60
    precompiled.close()
    commands.hooks_remove(kernel.config)
    assert attached(kernel) == NONE


def _install_killed_at(kernel: Kernel, step: int) -> None:
    """SIGKILL just before the step-th thing that changes anything outside of this process."""
    left = [step]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **named)

        return call

    bpfcall.pin = deadly(bpfcall.pin)
    bpfcall.create_link = deadly(bpfcall.create_link)
    bpfcall.update_link = deadly(bpfcall.update_link)
    pins.unmount = deadly(pins.unmount)
    os.replace = deadly(os.replace)
    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
    Path.mkdir = deadly(Path.mkdir)  # type: ignore[method-assign]
    install(kernel.site())


def test_a_replacement_killed_between_its_steps_is_finished(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    where = pins.Pins(Path(kernel.config.bpffs))
    program = bpfcall.get(str(where.programs / "connect4"))
    cgroup = os.open(kernel.mount + kernel.path, os.O_RDONLY)
    link = bpfcall.create_link(program, cgroup, _CONNECT4.attach_type)
    bpfcall.pin(link, str(where.links / "connect4+next"))
    for fd in (link, cgroup, program):
        os.close(fd)
    assert attached(kernel)["connect4"] == 2
    kernel.install()
    assert attached(kernel) == ONE_OF_EACH


def test_a_root_cgroup_made_again_is_attached_again(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    root = Path(kernel.mount + kernel.path) / "slice"
    root.mkdir()
    kernel.config = replace(kernel.config, cgroup_root=str(root))
    kernel.install()
    assert attached(kernel, "slice") == ONE_OF_EACH
    root.rmdir()
    wait_until(lambda: {link.cgroup for name, link in links(kernel).items() if "@" not in name} == {0})
    assert "cannot use cgroup" in install_refused(kernel)
    root.mkdir()
    kernel.install()
    assert attached(kernel, "slice") == ONE_OF_EACH


def test_an_agent_outside_of_the_root_takes_part_in_handing_over(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.config = replace(kernel.config, cgroup_root=f"{kernel.mount}{kernel.path}/app")
    kernel.install()
    assert attached(kernel, "app") == ONE_OF_EACH
    assert attached(kernel, "agent") == NONE | dict.fromkeys(("sockops", "connect4", "connect6"), 1)
    kernel.protect(V4, 4001)

    def proxy(talk: Connection) -> Any:
        with socket.create_server(("127.0.0.1", CAPTURE_PORT)) as listener:
            kernel.mark(listener)
            talk.send("listening")
            return kernel.note(listener.accept()[0])

    far = kernel.start(proxy, "agent")
    far.receive()
    kernel.run(lambda: socket.create_connection((V4, 4001)).close())
    assert far.result().original_port == 4001
    programs = {entry["name"]: entry["attached"] for entry in commands.hooks_status(kernel.config)["programs"]}
    assert programs == ONE_OF_EACH | {"sockops@agent": 1, "connect4@agent": 1, "connect6@agent": 1}
    kernel.config = replace(kernel.config, cgroup_root=kernel.mount + kernel.path)
    kernel.install()
    assert attached(kernel) == ONE_OF_EACH
    assert attached(kernel, "agent") == attached(kernel, "app") == NONE, "never both above one another"


def test_an_agent_that_would_exempt_everything_is_refused(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    assert "start it in a cgroup of its own" in install_refused(kernel, "/")
    assert attached(kernel) == NONE


def test_another_tool_that_holds_the_hook_exclusively_is_named(new_kernel: NewKernel, foreign: int) -> None:
    kernel = new_kernel()
    cgroup = os.open(kernel.mount + kernel.path, os.O_RDONLY)
    bpfcall._call(_PROG_ATTACH, struct.pack("=IIII", cgroup, foreign, _CONNECT4.attach_type, 0))
    try:
        text = install_refused(kernel)
        assert "cannot attach connect4" in text
        assert "another tool holds this hook exclusively" in text
        assert bpfcall.attached_programs(cgroup, _CONNECT4.attach_type) == [bpfcall.program_id(foreign)]
    finally:
        bpfcall._call(_PROG_DETACH, struct.pack("=IIII", cgroup, foreign, _CONNECT4.attach_type, 0))
        os.close(cgroup)
    kernel.install()
    assert attached(kernel) == ONE_OF_EACH


def test_another_tools_program_stays_through_install_and_remove(new_kernel: NewKernel, foreign: int) -> None:
    kernel = new_kernel()
    cgroup = os.open(kernel.mount + kernel.path, os.O_RDONLY)
    link = bpfcall.create_link(foreign, cgroup, _CONNECT4.attach_type)
    try:
        kernel.install()
        assert attached(kernel) == ONE_OF_EACH | {"connect4": 2}
        commands.hooks_remove(kernel.config)
        assert bpfcall.attached_programs(cgroup, _CONNECT4.attach_type) == [bpfcall.program_id(foreign)]
    finally:
        os.close(link)
        os.close(cgroup)


def test_remove_leaves_nothing(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    lines = commands.hooks_remove(kernel.config)
    assert f"unmounted the bpffs at {kernel.config.bpffs}" in lines
    assert sum(line.startswith("detached ") for line in lines) == len(source.PROGRAMS)
    assert attached(kernel) == NONE
    assert not os.path.ismount(kernel.config.bpffs)
    assert state.load(Path(kernel.config.state_dir), host.boot_id()) is None
    assert commands.hooks_remove(kernel.config) == [f"nothing is pinned in {kernel.config.bpffs}"]
    kernel.install()
    assert attached(kernel) == ONE_OF_EACH


def test_remove_leaves_what_is_not_ours(new_kernel: NewKernel, foreign: int) -> None:
    kernel = new_kernel()
    kernel.install()
    stranger = Path(kernel.config.bpffs) / "links" / "stranger"
    bpfcall.pin(foreign, str(stranger))
    lines = commands.hooks_remove(kernel.config)
    assert f"left {stranger}: it is not ours" in lines
    assert stranger.exists()
    assert os.path.ismount(kernel.config.bpffs)
    assert attached(kernel) == NONE
    stranger.unlink()


def test_a_bpffs_that_was_there_before_is_not_unmounted(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    point = kernel.directory / "mounted"
    point.mkdir()
    kernel.config = replace(kernel.config, bpffs=str(point / "underpass"))
    pins._mount(point)
    try:
        kernel.install()
        commands.hooks_remove(kernel.config)
        assert os.path.ismount(point)
        assert not (point / "underpass").exists()
    finally:
        commands.hooks_remove(kernel.config)
        pins.unmount(point)


def test_remove_is_refused_while_a_keeper_runs(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    with state.lock(Path(kernel.config.state_dir)), pytest.raises(Problem, match="stop the agent first"):
        commands.hooks_remove(kernel.config)
    assert attached(kernel) == ONE_OF_EACH


def test_a_changed_number_of_flows_is_refused_by_name_and_protection_goes_on(new_kernel: NewKernel) -> None:
    kernel = new_kernel(max_flows=64)
    kernel.install()
    changed = replace(kernel.config, capture=replace(kernel.config.capture, max_flows=128))
    old, kernel.config = kernel.config, changed
    text = install_refused(kernel)
    assert "max_entries is 64 and should be 128 (capture.max_flows has changed)" in text
    assert "underpass hooks remove" in text
    assert attached(kernel) == ONE_OF_EACH
    kernel.config = old


@pytest.mark.parametrize("schema", [records.SCHEMA_VERSION + 1, 200])
def test_another_schema_is_refused_by_name_and_not_touched(new_kernel: NewKernel, schema: int) -> None:
    kernel = new_kernel()
    kernel.install()
    settings = kernel.map("settings")
    value = bytearray(settings.lookup(bytes(4)) or b"")
    struct.pack_into("=I", value, 52, schema)
    settings.update(bytes(4), bytes(value))
    assert f"is of schema {schema} and this agent writes {records.SCHEMA_VERSION}" in install_refused(kernel)
    assert settings.lookup(bytes(4)) == bytes(value)


def test_a_map_of_another_kind_under_our_name_is_refused(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    where = Path(kernel.config.bpffs)
    (where / "callers").unlink()
    bpfcall.pin(kernel.map("verdicts").fd, str(where / "callers"))
    text = install_refused(kernel)
    assert "callers has another layout: key_size is 8 and should be 16" in text


def test_hooks_pinned_elsewhere_are_not_forgotten(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    kernel.install()
    old = kernel.config
    kernel.config = replace(old, bpffs=str(kernel.directory / "elsewhere"))
    assert "run `underpass hooks remove` with the old one first" in install_refused(kernel)
    assert not (kernel.directory / "elsewhere").exists()
    kernel.config = old


def test_what_the_kernel_does_not_take_is_one_clear_error(new_kernel: NewKernel) -> None:
    kernel = new_kernel()
    where = pins.Pins(Path(kernel.config.bpffs))
    pins.prepare(where)
    with pytest.raises(Problem, match=r"the kernel did not take bpf/: .*flows"):
        compile_programs(where.directory, where.staging, 0)
    assert attached(kernel) == NONE
