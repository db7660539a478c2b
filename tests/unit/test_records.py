"""agent/records.py: round trips, and every constant against bpf/flow.h."""

from __future__ import annotations

import re
from enum import IntEnum
from importlib import resources
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import records
from agent.records import Exit, Flow, Role, VerdictKind

HEADER = (resources.files("bpf") / "flow.h").read_text(encoding="utf-8")


def c_enum(name: str) -> dict[str, int]:
    """Member to number, as C counts."""
    found, following = {}, 0
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER, re.DOTALL)
    assert body is not None, name
    for member, number in re.findall(r"^\s*([A-Z_0-9]+)(?: = (\d+))?,", body[1], re.MULTILINE):
        following = int(number) if number else following
        found[member] = following
        following += 1
    return found


def c_define(name: str) -> int:
    found = re.search(rf"^#define {name} (\w+)", HEADER, re.MULTILINE)
    assert found is not None, name
    return int(found[1].rstrip("uUlL"), 0)


@pytest.mark.parametrize(
    ("name", "prefix", "mirror"),
    [("flow_role", "FLOW_", Role), ("verdict_kind", "VERDICT_", VerdictKind), ("exit", "EXIT_", Exit)],
)
def test_an_enum_has_the_members_of_its_c_twin(name: str, prefix: str, mirror: type[IntEnum]) -> None:
    numbers = {member.removeprefix(prefix): number for member, number in c_enum(name).items()}
    count = numbers.pop("COUNT", None)
    assert numbers == {member.name: member.value for member in mirror}
    assert count in (None, len(mirror))


@pytest.mark.parametrize("name", ["SCHEMA_VERSION", "ANY_UID", "CALLER_UNKNOWN", "CALLER_NOBODY"])
def test_a_constant_has_the_value_of_its_c_twin(name: str) -> None:
    assert getattr(records, name) == c_define(name)


_native = st.integers(1, 2**128 - 1).map(IPv6Address).filter(lambda address: address.ipv4_mapped is None)
addresses = st.integers(0, 2**32 - 1).map(IPv4Address) | _native
u64, u32, u16 = (st.integers(0, 2**bits - 1) for bits in (64, 32, 16))


@given(addresses)
def test_an_address_survives_the_kernel_form(address: records.Address) -> None:
    packed = records.pack_address(address)
    assert len(packed) == 16
    assert records.unpack_address(packed) == address


def test_no_address_is_all_zero() -> None:
    assert records.pack_address(None) == bytes(16)
    assert records.unpack_address(bytes(16)) is None


def test_a_mapped_address_is_its_ipv4_address() -> None:
    assert records.unpack_address(IPv6Address("::ffff:192.0.2.1").packed) == IPv4Address("192.0.2.1")


flows = st.builds(
    Flow, u64, u64, u64, addresses, st.none() | addresses, u32, u32, u32, u32, u16, u16, st.sampled_from(Role)
)


@given(flows)
def test_a_flow_survives_the_kernel_form(flow: Flow) -> None:
    assert records.unpack_flow(records.pack_flow(flow)) == flow


@given(st.binary(min_size=records.FLOW.size, max_size=records.FLOW.size))
def test_any_bytes_are_a_flow_or_a_value_error(data: bytes) -> None:
    try:
        flow = records.unpack_flow(data)
    except ValueError:
        return
    assert isinstance(flow.role, Role)


def test_a_flow_without_its_destination_is_never_guessed() -> None:
    with pytest.raises(ValueError, match="without its original destination"):
        records.unpack_flow(bytes(records.FLOW.size))


def test_a_delivered_note_shows_the_client() -> None:
    flow = records.unpack_flow(records.delivered(IPv4Address("192.0.2.7"), 40000, IPv4Address("192.0.2.1"), 5432))
    assert (flow.role, flow.source, flow.source_port) == (Role.DELIVERED, IPv4Address("192.0.2.7"), 40000)


@given(st.binary(min_size=records.REFUSAL.size, max_size=records.REFUSAL.size + 8))
def test_any_refusal_can_be_read(data: bytes) -> None:
    refusal = records.unpack_refusal(data)
    assert "\0" not in refusal.command


@given(st.binary(min_size=records.CLOSING.size, max_size=records.CLOSING.size + 8))
def test_any_closing_can_be_read(data: bytes) -> None:
    closing = records.unpack_closing(data)
    assert (closing.at_ns, closing.state) == (int.from_bytes(data[:8], "little"), data[120])


def test_a_service_is_local_only_when_said() -> None:
    assert records.SERVICE.unpack(records.service_value(7, None))[1:] == (7, 0)
    assert records.SERVICE.unpack(records.service_value(7, None, local=True))[1:] == (7, 1)


def test_a_key_matches_its_port_and_its_whole_address() -> None:
    key = records.service_key(IPv4Address("192.0.2.1"), 0x1234)
    assert key == (144).to_bytes(4, "little") + b"\x12\x34" + b"\0" * 10 + b"\xff\xff\xc0\x00\x02\x01" + b"\0\0"
