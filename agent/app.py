"""The composition root, the only place that sees both hooks and proxy: prepares the host, runs supervisor or role."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import pwd
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from agent import bpfcall, channel, host, privileges, ready
from agent.audit.writer import Writer
from agent.certs.issuer import EmbeddedIssuer
from agent.certs.store import load_host
from agent.config import Config, load_config
from agent.hooks.site import find_site
from agent.identity import ExeFile, IdentityRule, with_uids
from agent.records import listening
from agent.supervise import Supervisor

log = logging.getLogger("underpass")

BACKLOG = 4096
BIND_PATIENCE_S = 5.0
CHANNEL_BYTES = 4 << 20
_ADD_SEALS, _SEAL_ALL = 1033, 0xF  # include/uapi/linux/fcntl.h: seal, shrink, grow, write


class StartError(Exception):
    """The agent cannot start; the text says in one line what is missing and what to do."""


def read_config(path: str) -> Config:
    """StartError when it cannot be read; policy.fields.Invalid with every problem when it is wrong."""
    return load_config(_read_text(path), path)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


# The supervisor


def run(config_path: str) -> int:
    text = _read_text(config_path)
    config = load_config(text, config_path)
    _check_host(config)
    _prepare_directories(config)
    _allow_descriptors()
    with _only_one(config):
        listeners = _listen(config)
        return _supervise(config, _Origin(config_path, _keep(text)), listeners)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the configuration came from. `kept` is the text this agent was started with: a role that is restarted must
    not meet half an edit of the file, nor other settings than its siblings have."""

    path: str
    kept: int


def _keep(text: str) -> int:
    """In a sealed memory file: every role can read it, and none can change it for the next."""
    fd = os.memfd_create("underpass-config", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, text.encode())
    fcntl.fcntl(fd, _ADD_SEALS, _SEAL_ALL)
    return fd


def _allow_descriptors() -> None:
    """Each connection takes two. The usual soft limit of 1,024 is meant for programs that use select(2)."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_host(config: Config) -> None:
    if os.geteuid() != 0:
        raise StartError("underpass run needs root to load BPF programs; start it as root or through its systemd unit")
    try:
        pwd.getpwnam(config.user)
    except KeyError:
        raise StartError(f"user {config.user!r} does not exist; create it: useradd --system {config.user}") from None
    load_host(Path(config.ca), config.host, config.trust_domain, time.time())
    find_site(config)  # hooks would meet the same Problem at every start, for ever
    _check_own_cgroup()


def _check_own_cgroup() -> None:
    """The agent's cgroup is exempt from capture, so nothing but the agent may be in it."""
    others = [pid for pid in host.cgroup_members(host.own_cgroup()) if pid != os.getpid() and not _is_ours(pid)]
    if others:
        shown = ", ".join(str(pid) for pid in others[:5])
        raise StartError(
            f"this process shares cgroup {host.own_cgroup()} with others (pid {shown}), which would be exempt from "
            "capture; start it by its systemd unit, with systemd-run --scope, or in a cgroup of its own"
        )


def _is_ours(pid: int) -> bool:
    """A role of an agent that was killed and still drains."""
    try:
        return b"\0role\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # gone


def _prepare_directories(config: Config) -> None:
    """What the unprivileged roles write into belongs to them; everything else to root."""
    account = pwd.getpwnam(config.user)
    outcomes = Path(config.outcomes)
    try:
        for directory in (Path(config.run_dir), Path(config.state_dir), outcomes.parent):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        for directory in (Path(config.run_dir) / "control", Path(config.state_dir) / "control"):
            directory.mkdir(mode=0o750, exist_ok=True)
            os.chown(directory, account.pw_uid, account.pw_gid)
        Writer(config.outcomes).close()  # root's: whoever takes a proxy over must not reach what is written about him
    except OSError as error:
        raise StartError(f"cannot prepare {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _only_one(config: Config):  # type: ignore[no-untyped-def]
    # Not for others to read: any descriptor, also a reading one, is enough for flock(2) and to keep us from starting.
    with os.fdopen(os.open(Path(config.run_dir) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
        os.fchmod(file.fileno(), 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another agent runs with {config.run_dir}; stop it first, or give this one its own run_dir"
            ) from None
        yield


def _listen(config: Config) -> dict[str, socket.socket]:
    """All listening sockets, made once and kept: a restarted worker finds the same queue."""
    address, port = str(config.tunnel.listen[0]), config.tunnel.listen[1]
    # The admin port too: a process that takes it while control restarts would keep control from ever coming back.
    admin = str(config.admin.listen[0]), config.admin.listen[1]
    wanted = {"capture4": ("127.0.0.1", config.capture.port), "tunnel": (address, port), "admin": admin}
    if _has_ipv6():
        wanted["capture6"] = ("::1", config.capture.port)
    deadline = time.monotonic() + BIND_PATIENCE_S
    return {name: _bind(where, deadline, name) for name, where in wanted.items()}


def _bind(where: tuple[str, int], deadline: float, name: str) -> socket.socket:
    """An agent that was just killed may have workers that still let go: so try for a while."""
    family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if where[0] == "::" and family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(where)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            return sock
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise StartError(
                    f"cannot listen on {where[0]} port {where[1]} ({name.rstrip('46')}): {error.strerror}; "
                    "free it or choose another in the configuration"
                ) from error
            time.sleep(0.1)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _supervise(config: Config, origin: _Origin, listeners: dict[str, socket.socket]) -> int:
    supervisor = Supervisor(config.run_dir, lambda name, needs: _spawn(name, needs, origin), _tell_ready)
    supervisor.catch_signals()
    channels = _Channels()
    workers = [f"proxy-{number}" for number in range(config.workers or os.cpu_count() or 1)]
    whos = {f"who:{name}": channels.far(f"who:{name}") for name in workers}
    status, ours = channels.ends("status:hooks")
    needs = {"status": status, "orders": channels.far("orders:hooks"), **whos}
    supervisor.add("hooks", needs, ours)
    if not supervisor.run(until=lambda: supervisor.told("hooks", "maps")):
        supervisor.stop(0)
        return 0
    maps = {name: bpfcall.get(f"{config.bpffs}/{name}") for name in ("socket_flows", "refusals", "closes", "exits")}
    _mark(listeners, maps["socket_flows"])
    _add_control(supervisor, channels, workers, maps, listeners.pop("admin"))
    for name in workers:
        _add_proxy(supervisor, channels, name, maps, listeners)
    supervisor.run()
    log.info("stopping: live connections have %g s to end", config.limits.drain)
    ready.notify("STOPPING=1")
    for sock in listeners.values():
        sock.close()  # else new connects would wait in a queue that nobody reads any more
    supervisor.stop(config.limits.drain)
    return 0


def _mark(listeners: Mapping[str, socket.socket], socket_flows: int) -> None:
    """So that the kernel knows our capture listeners from those of whoever takes the port while no agent runs."""
    table = bpfcall.Map(socket_flows)
    for name, sock in listeners.items():
        if name.startswith("capture"):
            table.update(sock.fileno().to_bytes(4, "little"), listening(ip_address(sock.getsockname()[0])))


class _Channels:
    """Every channel between two roles, made once; both ends stay open here."""

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[socket.socket, socket.socket]] = {}

    def ends(self, name: str) -> tuple[int, socket.socket]:
        """(the descriptor for the role, our own end)."""
        pair = self._pair(name)
        return pair[0].fileno(), pair[1]

    def near(self, name: str) -> int:
        return self._pair(name)[0].fileno()

    def far(self, name: str) -> int:
        return self._pair(name)[1].fileno()

    def _pair(self, name: str) -> tuple[socket.socket, socket.socket]:
        if name not in self._pairs:
            self._pairs[name] = channel.pair(CHANNEL_BYTES)
        return self._pairs[name]


def _add_control(
    supervisor: Supervisor, channels: _Channels, workers: list[str], maps: Mapping[str, int], admin: socket.socket
) -> None:
    status, ours = channels.ends("status:control")
    orders = {f"orders:{name}": channels.near(f"orders:{name}") for name in ["hooks", *workers]}
    needs = {
        "status": status,
        "outcomes": channels.near("outcomes"),
        "refusals": maps["refusals"],
        "closes": maps["closes"],
        "exits": maps["exits"],
        "admin": admin.detach(),
    }
    supervisor.add("control", {**needs, **orders}, ours)


def _add_proxy(
    supervisor: Supervisor, channels: _Channels, name: str, maps: Mapping[str, int], listeners: dict[str, socket.socket]
) -> None:
    status, ours = channels.ends(f"status:{name}")
    needs = {
        "status": status, "orders": channels.far(f"orders:{name}"), "who": channels.near(f"who:{name}"),
        "outcomes": channels.far("outcomes"), "socket_flows": maps["socket_flows"],
    }  # fmt: skip
    needs |= {listener: sock.fileno() for listener, sock in listeners.items()}
    supervisor.add(name, needs, ours)


def _spawn(name: str, needs: Mapping[str, int], origin: _Origin) -> subprocess.Popen[bytes]:
    given = {**needs, "config": origin.kept}
    # -P: without it Python looks for modules in the current directory first, and that may be anybody's.
    command = [sys.executable, "-P", "-m", "agent", "role", name, "-c", origin.path, "--fds", json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, pass_fds=tuple(given.values()), stdin=subprocess.DEVNULL, env=environment)


def _tell_ready() -> None:
    ready.notify("READY=1")


# The roles


def run_role(name: str, config_path: str, fds: dict[str, int]) -> int:
    """In its own process, with the descriptors the supervisor passed; gives up its privileges before anything else."""
    try:
        return _run_role(name, config_path, fds)
    except (OSError, ValueError) as error:  # for `underpass status`; the log gets it too
        with socket.socket(fileno=os.dup(fds["status"])) as status:
            channel.send(status, {"type": "problem", "text": str(error)})
        raise


def _run_role(name: str, config_path: str, fds: dict[str, int]) -> int:
    kept = fds["config"]
    config = load_config(os.pread(kept, os.fstat(kept).st_size, 0).decode(), config_path)
    rules = with_uids(config.identities, _uids(config.identities))
    if name == "hooks":
        return _run_hooks(config, fds)
    if name == "control":
        return _run_control(config, fds)
    return _run_proxy(config, rules, fds)


def _run_hooks(config: Config, fds: dict[str, int]) -> int:
    from agent.hooks import role  # only here: no other role may carry what it imports

    privileges.drop_to(privileges.HOOKS)
    who = [_socket(fd) for key, fd in fds.items() if key.startswith("who:")]
    return role.main(config, _socket(fds["status"]), _socket(fds["orders"]), who)


def _run_control(config: Config, fds: dict[str, int]) -> int:
    from agent.control.role import Control, Inherited

    authority = load_host(Path(config.ca), config.host, config.trust_domain, time.time())
    writer = Writer(config.outcomes)
    privileges.become(config.user)
    orders = {key.removeprefix("orders:"): _socket(fd) for key, fd in fds.items() if key.startswith("orders:")}
    rings = fds["refusals"], fds["closes"]
    status, outcomes, admin = (_socket(fds[key]) for key in ("status", "outcomes", "admin"))
    inherited = Inherited(status, orders, outcomes, *rings, fds["exits"], admin)
    issuer = EmbeddedIssuer(authority, config.leaf_lifetime)
    control = Control(config, issuer, authority.roots_pem, inherited, writer)
    return asyncio.run(control.run())


def _run_proxy(config: Config, rules: tuple[IdentityRule, ...], fds: dict[str, int]) -> int:
    import signal

    from agent.proxy import worker

    privileges.become(config.user)
    sys.unraisablehook = worker.count_unraisable
    captures = tuple(_socket(fds[name]) for name in ("capture4", "capture6") if name in fds)
    inherited = worker.Inherited(
        _socket(fds["status"]), _socket(fds["orders"]), _socket(fds["who"]), _socket(fds["outcomes"]), captures,
        _socket(fds["tunnel"]), bpfcall.Map(fds["socket_flows"]),
    )  # fmt: skip
    proxy = worker.Worker(config, rules, lambda: _executables(rules), inherited)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: proxy.drain_soon())
    return proxy.run()


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def _uids(rules: tuple[IdentityRule, ...]) -> dict[str, int]:
    found = {}
    for rule in rules:
        if isinstance(rule.match.uid, str):
            uid = host.user_id(rule.match.uid)
            if uid is not None:  # no such account (yet): the rule matches nobody
                found[rule.match.uid] = uid
    return found


def _executables(rules: tuple[IdentityRule, ...]) -> dict[str, ExeFile]:
    """Asked each time: a package upgrade puts another file at the same path."""
    found = {}
    for rule in rules:
        if rule.match.exe is not None:
            file = host.executable(rule.match.exe)
            if file is not None:
                found[rule.match.exe] = file
    return found
