"""The agent's configuration file to one value; Invalid with every problem and its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

from agent.identity import ANY, UNIT_SUFFIXES, IdentityRule, Selector
from policy import fields
from policy.fields import Fields, Kind, Scalar, SocketAddress
from policy.identity import LABEL, SpiffeId


@dataclass(frozen=True, slots=True)
class Capture:
    port: int = 15001
    max_flows: int = 65536


@dataclass(frozen=True, slots=True)
class Listener:
    listen: SocketAddress


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    connect_timeout: float = 10.0
    handshake_timeout: float = 5.0
    drain: float = 30.0
    idle_tunnel: float = 60.0


@dataclass(frozen=True, slots=True)
class Config:
    """`cgroup_root` None: find the cgroup2 mount. `workers` None: one per core. Durations are seconds."""

    host: str
    trust_domain: str
    identities: tuple[IdentityRule, ...]
    cgroup_root: str | None = None
    state_dir: str = "/var/lib/underpass"
    run_dir: str = "/run/underpass"
    bpffs: str = "/sys/fs/bpf/underpass"
    user: str = "underpass"
    workers: int | None = None
    capture: Capture = Capture()
    tunnel: Listener = Listener((ip_address("0.0.0.0"), 15008))
    admin: Listener = Listener((ip_address("127.0.0.1"), 15090))
    ca: str = "/etc/underpass/ca"
    leaf_lifetime: float = 3600.0
    policy: str = "/etc/underpass/policy.d"
    services: str = "/etc/underpass/services.yaml"
    outcomes: str = "/var/log/underpass/outcomes.jsonl"
    report_open_every: float = 15.0
    check_listeners: bool = True
    limits: Limits = Limits()


def load_config(text: str, source: str) -> Config:
    return fields.read(text, source, list(Config.__dataclass_fields__), _config)


def _config(top: Fields) -> Config:
    base = Config("", "", ())  # one place for defaults
    host = top.required("host", fields.label)
    trust_domain = top.required("trust_domain", _TRUST_DOMAIN)
    config = Config(
        host=host,
        trust_domain=trust_domain,
        identities=top.each("identities", ("application", "match"), partial(_identity, host, trust_domain)),
        cgroup_root=top.optional("cgroup_root", _PATH, base.cgroup_root),
        state_dir=top.optional("state_dir", _PATH, base.state_dir),
        run_dir=top.optional("run_dir", _PATH, base.run_dir),
        bpffs=top.optional("bpffs", _PATH, base.bpffs),
        user=top.optional("user", _USER, base.user),
        workers=top.optional("workers", fields.integer(1, 64), base.workers),
        capture=_capture(top.section("capture", ("port", "max_flows")), base.capture),
        tunnel=_listener(top.section("tunnel", ("listen",)), base.tunnel),
        admin=_listener(top.section("admin", ("listen",)), base.admin),
        ca=top.optional("ca", _PATH, base.ca),
        leaf_lifetime=top.optional("leaf_lifetime", fields.duration(60, 86400), base.leaf_lifetime),
        policy=top.optional("policy", _PATH, base.policy),
        services=top.optional("services", _PATH, base.services),
        outcomes=top.optional("outcomes", _PATH, base.outcomes),
        report_open_every=top.optional("report_open_every", fields.duration(1, 3600), base.report_open_every),
        check_listeners=top.optional("check_listeners", fields.boolean, base.check_listeners),
        limits=_limits(top.section("limits", list(Limits.__dataclass_fields__)), base.limits),
    )
    _check_ports(top, config)
    return config


def _capture(section: Fields, base: Capture) -> Capture:
    return Capture(
        port=section.optional("port", fields.integer(1, 65535), base.port),
        max_flows=section.optional("max_flows", fields.integer(16, 1048576), base.max_flows),
    )


def _listener(section: Fields, base: Listener) -> Listener:
    return Listener(section.optional("listen", fields.socket_address, base.listen))


def _limits(section: Fields, base: Limits) -> Limits:
    return Limits(
        connect_timeout=section.optional("connect_timeout", fields.duration(0.1, 600), base.connect_timeout),
        handshake_timeout=section.optional("handshake_timeout", fields.duration(0.1, 600), base.handshake_timeout),
        drain=section.optional("drain", fields.duration(0, 3600), base.drain),
        idle_tunnel=section.optional("idle_tunnel", fields.duration(1, 86400), base.idle_tunnel),
    )


def _check_ports(top: Fields, config: Config) -> None:
    used = {"capture": config.capture.port, "tunnel": config.tunnel.listen[1], "admin": config.admin.listen[1]}
    for key, port in used.items():
        others = [other for other, taken in used.items() if taken == port and other != key]
        if others and key in top:
            top.problem(f"{key}: port {port} is also the one of {others[0]}; give each its own", key)


def _identity(host: str, trust_domain: str, item: Fields) -> IdentityRule:
    application = item.required("application", fields.label)
    if host and trust_domain and application:
        try:
            SpiffeId(trust_domain, host, application)
        except ValueError as error:  # names that are fine alone may be too long together
            item.problem(f"application: {error}, and keep it short", "application")
    return IdentityRule(application, _selector(item.section("match", list(Selector.__dataclass_fields__), True), item))


def _selector(match: Fields, item: Fields) -> Selector:
    selector = Selector(
        cgroup=match.optional("cgroup", _CGROUP, None),
        unit=match.optional("unit", _UNIT, None),
        uid=match.optional("uid", _UID, None),
        exe=match.optional("exe", _PATH, None),
    )
    if match.empty:
        item.problem("match: give at least one of cgroup, unit, uid and exe; an empty match fits nobody", "match")
    return selector


def _path(scalar: Scalar) -> str:
    text = fields.string.parse(scalar)
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"expected an absolute path without .. such as /etc/underpass, got {text!r}")
    return text


def _cgroup(scalar: Scalar) -> tuple[str, ...]:
    text = fields.string.parse(scalar)
    segments = tuple(text.removeprefix("/").split("/"))
    plain = all(segment not in ("", ".", "..") and (ANY not in segment or segment == ANY) for segment in segments)
    if not text.startswith("/") or not plain:
        raise ValueError(f'expected a cgroup such as /bank/ledger, "*" only for a whole segment, got {text!r}')
    return segments


def _unit(scalar: Scalar) -> str:
    text = fields.string.parse(scalar)
    if not text.endswith(UNIT_SUFFIXES) or "/" in text or text in UNIT_SUFFIXES:
        raise ValueError(f"expected a systemd unit such as postgresql.service, got {text!r}")
    return text


def _uid(scalar: Scalar) -> int | str:
    text = fields.string.parse(scalar)
    return _MAX_UID.parse(scalar) if scalar.plain and not _ACCOUNT.fullmatch(text) else _user(scalar)


def _user(scalar: Scalar) -> str:
    text = fields.string.parse(scalar)
    if not _ACCOUNT.fullmatch(text):
        raise ValueError(f"expected the name of an account, got {text!r}")
    return text


def _trust_domain(scalar: Scalar) -> str:
    text = fields.string.parse(scalar)
    if not all(LABEL.fullmatch(part) for part in text.split(".")):
        raise ValueError(f"expected a trust domain of lower-case names and dots such as demo.bank, got {text!r}")
    return text


_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?")
_MAX_UID = fields.integer(0, 2**32 - 2)  # 2**32 - 1 is (uid_t)-1: "no user" to the kernel
_PATH = Kind(_path, "/")
_CGROUP: Kind[tuple[str, ...]] = Kind(_cgroup, ())
_UNIT = Kind(_unit, "")
_UID: Kind[int | str] = Kind(_uid, 0)
_USER = Kind(_user, "")
_TRUST_DOMAIN = Kind(_trust_domain, "")
