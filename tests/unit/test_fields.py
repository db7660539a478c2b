"""Strict reading: what YAML would guess is refused, and everything wrong is told at once."""

from __future__ import annotations

from enum import Enum
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import fields
from policy.fields import Fields, Invalid, Kind, Problem, read

KEYS = ("port", "name", "items", "section")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def value_of(kind: Kind[object], text: str) -> object:
    return read(f"port: {text}\n", "f.yaml", ("port",), lambda top: top.required("port", kind))


def problems_of(text: str) -> list[str]:
    with pytest.raises(Invalid) as caught:
        read(text, "f.yaml", KEYS, lambda top: top.optional("port", fields.integer(1, 9), 0))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (fields.string, "no", "no"),
        (fields.string, "on", "on"),
        (fields.string, "12:30", "12:30"),
        (fields.string, "0600", "0600"),
        (fields.string, "2024-01-01", "2024-01-01"),
        (fields.string, '""', ""),
        (fields.label, "no", "no"),
        (fields.label, "1e3", "1e3"),
        (fields.integer(1, 65535), "5432", 5432),
        (fields.integer(-5, 5), "-5", -5),
        (fields.integer(0, 5), "0", 0),
        (fields.boolean, "true", True),
        (fields.boolean, "false", False),
        (fields.duration(0, 86400), "1h", 3600.0),
        (fields.duration(0, 86400), "30s", 30.0),
        (fields.duration(0, 86400), '"500ms"', 0.5),
        (fields.duration(0, 86400), "0s", 0.0),
        (fields.address, "10.0.0.1", ip_address("10.0.0.1")),
        (fields.address, "fd77::2", ip_address("fd77::2")),
        (fields.ports, "5432", (5432, 5432)),
        (fields.ports, '"5432"', (5432, 5432)),
        (fields.ports, "9000-9010", (9000, 9010)),
        (fields.socket_address, "10.0.0.1:15008", (ip_address("10.0.0.1"), 15008)),
        (fields.socket_address, '"[fd77::2]:15008"', (ip_address("fd77::2"), 15008)),
        (fields.choice(Colour), "blue", Colour.BLUE),
    ],
)
def test_a_value_is_read_by_the_type_that_is_asked_for(kind: Kind[object], text: str, value: object) -> None:
    found = value_of(kind, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((fields.string, text) for text in ["", "~", "null", "[a]", "{a: b}", r'"\ud800"', r'"a\nb"', r'"\0"']),
        *((fields.label, text) for text in ["Ledger", "a_b", "-a", "a.b", '"a "', "a" * 64, '"*"', "null."]),
        *((fields.integer(1, 9999), text) for text in ["0600", "0x10", "0o17", "1_000", "12:30", "1e3", "5.0", "+5"]),
        *((fields.integer(1, 9999), text) for text in ['"5"', "0", "10000", "", "９", "9" * 5000, "yes"]),
        *((fields.boolean, text) for text in ["no", "yes", "on", "off", "y", "True", '"true"', "1", ""]),
        *((fields.duration(1, 60), text) for text in ["30", "1m30s", "1.5s", "30 s", "-1s", "030s", "2h", "0s", "1d"]),
        *((fields.address, text) for text in ["10.0.0", "010.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "db1", ""]),
        *((fields.ports, text) for text in ["0", "65536", "10-9", "1-65536", "0600", "1_0", "12:30", "-5", "1-", "９"]),
        *((fields.socket_address, text) for text in ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "db1:80", ":80"]),
        *((fields.socket_address, text) for text in ['"fd77::2:80"', '"[10.0.0.1]:80"', '"[fd77::2]"', '"[]:80"']),
        *((fields.choice(Colour), text) for text in ["RED", "green", ""]),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_guessed(kind: Kind[object], text: str) -> None:
    with pytest.raises(Invalid, match=r"f\.yaml:1: port: expected"):
        value_of(kind, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot: 2\n", ["f.yaml:1: unknown key 'prot'; did you mean 'port'? known keys are port, name, items, section"]),
        ("port: 1\n\nport: 2\n", ["f.yaml:3: key 'port' is given twice, first on line 1; keep one"]),
        ("port: &x 1\n", ["f.yaml:1: anchors and aliases are not allowed; write the value out"]),
        ("name: &x a\nport: *x\n", ["f.yaml:1: anchors", "f.yaml:2: anchors"]),
        ("port: *nowhere\n", ["f.yaml:1: anchors"]),
        ("port: !!int 5\n", ["f.yaml:1: tags are not allowed; remove 'tag:yaml.org,2002:int'"]),
        ("port: !python/object:os.system 5\n", ["f.yaml:1: tags"]),
        ("! port: 5\n", ["f.yaml:1: tags"]),
        ("1: 2\n", ["f.yaml:1: a key must be a string, got '1'; quote it"]),
        ("true: 2\n~: 3\n? [a]\n: 4\n", ["f.yaml:1: a key", "f.yaml:2: a key", "f.yaml:3: a key"]),
        ("no: 2\n", ["f.yaml:1: unknown key 'no'"]),
        ("<<: {port: 2}\n", ["f.yaml:1: unknown key '<<'"]),
        ("port: 1\n---\nport: 2\n", ["f.yaml:2: a second document starts here; keep one document per file"]),
        ("", ["f.yaml:1: document is empty"]),
        ("# only a comment\n", ["f.yaml:1: document is empty"]),
        ("---\n...\n", ["f.yaml:1: document is empty"]),
        ("- port\n", ["f.yaml:1: document: expected a mapping of keys to values, got a list"]),
        ("port: 1\nname: [\n", ["f.yaml:3: not valid YAML: "]),
        ("port: 1\nname: \x00\n", ["f.yaml:2: not valid YAML: character U+0000 is not allowed; remove it"]),
        ('port: 1\nname: "\\UFFFFFFFF"\n', ["f.yaml:2: not valid YAML: number out of range"]),
        ('port: 1\nname: "\\U00110000"\n', ["f.yaml:2: not valid YAML: number out of range"]),
        ("port: 1\nname: \t%\n", ["f.yaml:2: not valid YAML: "]),
        ("#" * fields.MAX_BYTES + "#", ["f.yaml:1: document is larger than 1048576 bytes; split it"]),
        ("[" * 100_000, ["f.yaml:1: not valid YAML: nested deeper than 16 levels"]),
        ("{a: " * 100_000, ["f.yaml:1: not valid YAML: nested deeper than 16 levels"]),
        ("- " * 100_000, ["f.yaml:1: not valid YAML: nested deeper than 16 levels"]),
    ],
)
def test_what_is_refused_of_yaml_is_told_with_its_line(text: str, expected: list[str]) -> None:
    found = problems_of(text)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_every_problem_is_told_in_order_of_lines() -> None:
    def build(top: Fields) -> None:
        top.required("name", fields.label)
        top.many("items", fields.ports)
        top.section("section", ("port",)).required("port", fields.integer(1, 9))

    text = "colour: red\nitems:\n  - 0\n  - 5\n  - [6]\nsection:\n  prt: 7\n"
    with pytest.raises(Invalid) as caught:
        read(text, "f.yaml", KEYS, build)
    assert [problem.line for problem in caught.value.problems] == [1, 1, 3, 5, 6, 7]
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]


def test_unreadable_items_are_left_out_so_that_later_checks_see_no_stand_in() -> None:
    seen: list[tuple[int, ...]] = []
    with pytest.raises(Invalid):
        read("items: [a, 5, &x 6]", "f", KEYS, lambda top: seen.append(top.many("items", fields.integer(1, 9))))
    assert seen == [(5, 6)]


def test_an_absent_section_asks_for_nothing() -> None:
    section = read("port: 1", "f", KEYS, lambda top: top.section("section", ("port",)))
    assert section.required("port", fields.integer(3, 9)) == 3


def test_an_absent_required_section_is_a_single_problem() -> None:
    def build(top: Fields) -> None:
        top.section("section", ("port",), required=True).required("port", fields.ports)

    with pytest.raises(Invalid, match=r"^f:1: required key 'section' is missing; add it$"):
        read("port: 1", "f", KEYS, build)


def test_a_problem_of_the_whole_document_has_no_line() -> None:
    assert str(Problem("caller", 0, "two share an id")) == "caller: two share an id"


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="ab:-?[]{},&*!|>'\"%#@\\U9 \n\t"))
def test_no_text_raises_anything_but_invalid(text: str) -> None:
    try:
        read(text, "f", KEYS, lambda top: top.many("items", fields.string))
    except Invalid as invalid:
        told = str(invalid)
    else:
        return
    assert told.encode().startswith(b"f:")
