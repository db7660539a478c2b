"""Policy and services files to values; Invalid with every problem of every file at once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

from policy import fields
from policy.fields import Fields, Invalid, IPAddress, Kind, Problem, Scalar, SocketAddress
from policy.model import (
    ANY,
    DEFAULT_RULE,
    Directory,
    Effect,
    Endpoint,
    MeshHost,
    Pattern,
    Policy,
    PortRange,
    Rule,
    SameNode,
    Service,
    parse_pattern,
)

VERSION = 1
MAX_CAPTURED = 16384  # (address, port) entries of a directory: the size of the kernel's table of captured addresses


def load_policy(text: str, source: str) -> Policy:
    return load_policies([(source, text)])


def load_policies(files: Iterable[tuple[str, str]]) -> Policy:
    """Merge (source, text) pairs in the order given. No files is a policy without rules: it allows nothing."""
    rules: list[Rule] = []
    problems: list[Problem] = []
    stated: dict[SameNode, str] = {}
    names: dict[str, str] = {}
    for source, text in files:
        try:
            rules += fields.read(text, source, ("version", "same_node", "rules"), partial(_policy_file, stated, names))
        except Invalid as invalid:
            problems += invalid.problems
    if problems:
        raise Invalid(problems)
    return Policy(VERSION, next(iter(stated), SameNode.DIRECT), tuple(rules))


def _policy_file(stated: dict[SameNode, str], names: dict[str, str], top: Fields) -> tuple[Rule, ...]:
    """`stated` and `names` remember, over all files, where same_node and each rule were first written."""
    top.required("version", fields.integer(VERSION, VERSION))
    same_node = top.optional("same_node", fields.choice(SameNode), None)
    if same_node is not None:
        stated.setdefault(same_node, top.place("same_node"))
        others = [place for value, place in stated.items() if value is not same_node]
        if others:
            top.problem(f"same_node differs from {others[0]}; state it in one file", "same_node")
    return top.each("rules", ("name", "allow", "deny"), partial(_rule, names))


def _rule(names: dict[str, str], item: Fields) -> Rule:
    name = item.required("name", fields.label)
    if name == DEFAULT_RULE:  # logs say "default" where no rule matched; a rule of that name would make them lie
        item.problem(f"rule name {name!r} is reserved for requests that match no rule; choose another", "name")
    if name and names.setdefault(name, item.place("name")) != item.place("name"):
        item.problem(f"rule {name!r} exists already in {names[name]}; rename one", "name")
    effects = [effect for effect in Effect if effect.value in item]
    if len(effects) != 1:
        item.problem("a rule needs exactly one of allow and deny")
    effect = effects[0] if effects else Effect.DENY
    body = item.section(effect.value, ("from", "to", "ports"))
    return Rule(
        name=name,
        effect=effect,
        sources=body.many("from", _PATTERN),
        services=body.many("to", _TARGET),
        ports=body.many("ports", _PORTS) if "ports" in body else None,
    )


def load_directory(text: str, source: str) -> Directory:
    """Read the services file."""
    return fields.read(text, source, ("hosts", "services"), _directory)


def _directory(top: Fields) -> Directory:
    hosts = top.named("hosts", ("tunnel",), lambda name, item: MeshHost(name, item.required("tunnel", _TUNNEL)))
    keys = ("application", "ports", "endpoints", "addresses")
    built = top.named("services", keys, lambda name, item: (_service(name, item, hosts), item))
    _check_overlaps(list(built.values()))
    captured = sum(len(service.captured) * sum(map(len, service.ports)) for service, _ in built.values())
    if captured > MAX_CAPTURED:
        text = f"services capture {captured} (address, port) pairs, more than {MAX_CAPTURED}; narrow port ranges"
        top.problem(text, "services")
    return Directory(hosts, {name: service for name, (service, _) in built.items()})


def _service(name: str, item: Fields, hosts: dict[str, MeshHost]) -> Service:
    ports = item.many("ports", _PORTS, least=1)
    if any(high.low <= low.high for low, high in pairwise(sorted(ports))):
        item.problem("ports: the ranges of one service overlap; list each port once", "ports")
    single = sum(map(len, ports)) <= 1  # 0: they could not be read, which is told already
    service = Service(
        name=name,
        application=item.required("application", fields.label),
        ports=ports,
        endpoints=item.each("endpoints", ("host", "address", "port"), partial(_endpoint, hosts, single), least=1),
        addresses=item.many("addresses", _DIALLED) if "addresses" in item else (),
    )
    _check_addresses(service, item)
    return service


def _endpoint(hosts: dict[str, MeshHost], single: bool, item: Fields) -> Endpoint:
    host = item.required("host", fields.label)
    if host and host not in hosts:
        item.problem(f"host {host!r} is not listed under hosts; add it there or correct the name", "host")
    port = item.optional("port", fields.integer(1, 65535), None)
    if port is not None and not single:  # one far port cannot stand for several dialled ones
        item.problem("port: only a service with exactly one port may have another port at its endpoint", "port")
    return Endpoint(host, item.required("address", _DIALLED), port)


def _check_addresses(service: Service, item: Fields) -> None:
    addresses = [endpoint.address for endpoint in service.endpoints] + list(service.addresses)
    for address in dict.fromkeys(address for address in addresses if addresses.count(address) > 1):
        # An endpoint is (host, address): the same address twice would leave open who has to answer there.
        item.problem(f"address {address} is listed twice in service {service.name!r}; list it once")


def _check_overlaps(built: list[tuple[Service, Fields]]) -> None:
    """An (address, port) of two services would be captured for either: refuse it."""
    taken: dict[IPAddress, list[tuple[PortRange, Service, Fields]]] = {}
    for service, item in built:
        for address in service.captured:
            taken.setdefault(address, []).extend((ports, service, item) for ports in service.ports)
    for address, entries in taken.items():
        entries.sort(key=lambda entry: entry[0])
        end, owner = 0, ""
        for ports, service, item in entries:
            if ports.low <= end and service.name != owner:
                item.problem(f"{address} port {ports.low} belongs to {owner!r} and {service.name!r}; give each its own")
            if ports.high > end:
                end, owner = ports.high, service.name


def _pattern(scalar: Scalar) -> Pattern:
    return parse_pattern(scalar.text)


def _target(scalar: Scalar) -> str:
    return ANY if scalar.text == ANY else fields.label.parse(scalar)


def _port_range(scalar: Scalar) -> PortRange:
    return PortRange(*fields.ports.parse(scalar))


def _dialled(scalar: Scalar) -> IPAddress:
    address = fields.address.parse(scalar)
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise ValueError(f"expected an address that other hosts can dial, got {scalar.text!r}")
    return address


def _tunnel(scalar: Scalar) -> SocketAddress:
    address, port = fields.socket_address.parse(scalar)
    if address.is_multicast or address.is_unspecified:
        raise ValueError(f"expected the address at which other hosts reach this one, got {scalar.text!r}")
    return address, port


_PATTERN = Kind(_pattern, Pattern(ANY, ANY))
_TARGET = Kind(_target, "")
_PORTS = Kind(_port_range, PortRange(1, 1))
_DIALLED = Kind(_dialled, fields.address.stand_in)
_TUNNEL = Kind(_tunnel, fields.socket_address.stand_in)
