"""Strict YAML for policy and configuration: every key known, every value of the wanted type, every problem at once.

Why not `safe_load`: YAML 1.1 turns `no` into false, 12:30 into 750 and 0600 into 384, keeps the last of two equal keys
and forgets lines. Here a value is read from its text, by the type its reader asks for, and nothing is guessed.
After a problem a stand-in of the right type is used so that reading goes on; `read` then never returns the result.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Generic, TypeVar

import yaml

from policy.identity import LABEL

MAX_BYTES = 1 << 20
MAX_DEPTH = 16  # our deepest document has 6 levels; the composer recurses, so depth has to end before Python's stack

T = TypeVar("T")
D = TypeVar("D")
E = TypeVar("E", bound=Enum)
IPAddress = IPv4Address | IPv6Address
SocketAddress = tuple[IPAddress, int]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with one document; line 0 means the document as a whole."""

    source: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.text}" if self.line else f"{self.source}: {self.text}"


class Invalid(ValueError):
    """The document is refused; `problems` has everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def read(text: str, source: str, known: Sequence[str], build: Callable[[Fields], T]) -> T:
    """Read a document whose top is a mapping with the `known` keys; Invalid with every problem found."""
    notes = _Notes(source)
    node = _compose(text, notes)
    value = None if node is None else build(Fields(notes, node, known))
    if value is None or notes.problems:
        raise Invalid(sorted(notes.problems, key=lambda problem: problem.line))
    return value


class Fields:
    """One mapping of a document. Absent or unreadable mappings are empty and ask for nothing (see module text)."""

    def __init__(
        self, notes: _Notes, node: yaml.Node | None, known: Sequence[str] | None, name: str = "document", line: int = 0
    ) -> None:
        self.line = line or (_line(node) if node else 0)
        self._notes = notes
        self._nodes: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        self._demanding = isinstance(node, yaml.MappingNode)
        if isinstance(node, yaml.MappingNode):
            self._index(node, known)
        elif node is not None and node.tag != _BROKEN:
            notes.add(self.line, f"{name}: expected a mapping of keys to values, got {_show(node)}")

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    @property
    def empty(self) -> bool:
        """A mapping that is there and has no key, not even an unknown one."""
        return self._demanding and not self._lines

    def place(self, key: str = "") -> str:
        """Where this mapping or one of its keys stands, for texts that point at it."""
        return f"{self._notes.source}:{self._lines.get(key, self.line)}"

    def problem(self, text: str, key: str = "") -> None:
        self._notes.add(self._lines.get(key, self.line), text)

    def required(self, key: str, kind: Kind[T]) -> T:
        node = self._demand(key)
        return kind.stand_in if node is None else self._scalar(node, key, kind)

    def optional(self, key: str, kind: Kind[T], default: D) -> T | D:
        node = self._nodes.get(key)
        return default if node is None else self._scalar(node, key, kind)

    def many(self, key: str, kind: Kind[T], least: int = 0) -> tuple[T, ...]:
        """A required list of scalars; ask `key in fields` first where it is optional. Unreadable items are left out."""
        return self._clean(key, least, lambda node: self._scalar(node, key, kind))

    def each(self, key: str, known: Sequence[str], build: Callable[[Fields], T], least: int = 0) -> tuple[T, ...]:
        """A required list of mappings. Items with a problem are left out: no check between items sees a stand-in."""
        return self._clean(key, least, lambda node: build(Fields(self._notes, node, known, key)))

    def section(self, key: str, known: Sequence[str], required: bool = False) -> Fields:
        node = self._demand(key) if required else self._nodes.get(key)
        return Fields(self._notes, node, known, key, self._lines.get(key, self.line))

    def named(self, key: str, known: Sequence[str], build: Callable[[str, Fields], T]) -> dict[str, T]:
        """A required mapping of names to mappings. Items with a problem stay, so that references to them resolve."""
        table = Fields(self._notes, self._demand(key), None, key)
        for name in table._nodes:
            if not LABEL.fullmatch(name):
                table.problem(f"{key}: {_expected_label(name)}", name)
        return {name: build(name, table.section(name, known)) for name in table._nodes}

    def _demand(self, key: str) -> yaml.Node | None:
        if key not in self._nodes and self._demanding:
            self.problem(f"required key {key!r} is missing; add it")
        return self._nodes.get(key)

    def _scalar(self, node: yaml.Node, key: str, kind: Kind[T]) -> T:
        if node.tag == _BROKEN:
            return kind.stand_in
        if not isinstance(node, yaml.ScalarNode):
            self._notes.add(_line(node), f"{key}: expected a single value, got {_show(node)}")
            return kind.stand_in
        try:
            return kind.parse(Scalar(node.value, plain=node.style is None))
        except ValueError as error:
            self._notes.add(_line(node), f"{key}: {error}")
            return kind.stand_in

    def _clean(self, key: str, least: int, build: Callable[[yaml.Node], T]) -> tuple[T, ...]:
        items = []
        for node in self._list(key, least):
            before = len(self._notes.problems)
            item = build(node)
            if len(self._notes.problems) == before and node.tag != _BROKEN:
                items.append(item)
        return tuple(items)

    def _list(self, key: str, least: int) -> list[yaml.Node]:
        node = self._demand(key)
        if isinstance(node, yaml.SequenceNode):
            if len(node.value) < least:
                self.problem(f"{key}: expected at least {least}, got {len(node.value)}", key)
            return list(node.value)
        if node is not None and node.tag != _BROKEN:
            self._notes.add(_line(node), f"{key}: expected a list, got {_show(node)}; write [] for an empty one")
        return []

    def _index(self, node: yaml.MappingNode, known: Sequence[str] | None) -> None:
        for key_node, value in node.value:
            line, key = _line(key_node), self._key(key_node)
            if key is None:
                continue
            if key in self._lines:
                self._notes.add(line, f"key {key!r} is given twice, first on line {self._lines[key]}; keep one")
                continue
            self._lines[key] = line
            if known is None or key in known:
                self._nodes[key] = value
            else:
                self._notes.add(line, _unknown(key, known))

    def _key(self, node: yaml.Node) -> str | None:
        if isinstance(node, yaml.ScalarNode) and (node.style is not None or not _NOT_A_STRING.fullmatch(node.value)):
            return str(node.value)
        if node.tag != _BROKEN:
            self._notes.add(_line(node), f"a key must be a string, got {_show(node)}; quote it")
        return None


@dataclass(frozen=True, slots=True)
class Scalar:
    """The text of a value as written, and whether it was written without quotes."""

    text: str
    plain: bool


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A type of value: how to parse it (ValueError says what was expected) and what stands in after a problem."""

    parse: Callable[[Scalar], T]
    stand_in: T


def _string(scalar: Scalar) -> str:
    if scalar.plain and scalar.text in ("", "~", "null"):  # a key without a value is an unfinished line, not ""
        raise ValueError("expected a text, got nothing; write a value or leave the key out")
    if not scalar.text.isprintable():  # also lone surrogates, which no log or socket would take
        raise ValueError(f"expected a text on one line without control characters, got {_quote(scalar.text)}")
    return scalar.text


def _label(scalar: Scalar) -> str:
    if not LABEL.fullmatch(scalar.text):
        raise ValueError(_expected_label(scalar.text))
    return scalar.text


def _boolean(scalar: Scalar) -> bool:
    if not scalar.plain or scalar.text not in ("true", "false"):
        raise ValueError(f"expected true or false without quotes, got {_quote(scalar.text)}")
    return scalar.text == "true"


def _integer(low: int, high: int, scalar: Scalar) -> int:
    if not scalar.plain or not _DECIMAL.fullmatch(scalar.text) or not low <= int(scalar.text) <= high:
        wanted = f"the number {low}" if low == high else f"a whole number from {low} to {high}"
        raise ValueError(f"expected {wanted} in plain decimal digits, got {_quote(scalar.text)}")
    return int(scalar.text)


def _duration(low: float, high: float, scalar: Scalar) -> float:
    found = _DURATION.fullmatch(scalar.text)
    if not found:
        raise ValueError(f'expected a duration such as "500ms", "30s", "5m" or "1h", got {_quote(scalar.text)}')
    seconds = int(found[1]) * _SECONDS[found[2]]
    if not low <= seconds <= high:
        raise ValueError(f"expected a duration from {low:g} to {high:g} seconds, got {_quote(scalar.text)}")
    return seconds


def _address(scalar: Scalar) -> IPAddress:
    try:
        found = ip_address(scalar.text)
    except ValueError:
        raise ValueError(f"expected an IPv4 or IPv6 address, got {_quote(scalar.text)}") from None
    # One spelling per address: the kernel table has neither scopes nor mapped addresses, and would never match them.
    if isinstance(found, IPv6Address) and (found.ipv4_mapped or found.scope_id):
        raise ValueError(f"expected an address without scope and not IPv4-mapped, got {_quote(scalar.text)}")
    return found


def _ports(scalar: Scalar) -> tuple[int, int]:
    found = _PORTS.fullmatch(scalar.text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise ValueError(f"expected a port from 1 to 65535 or a range such as 9000-9010, got {_quote(scalar.text)}")
    return low, high


def _socket_address(scalar: Scalar) -> SocketAddress:
    found = _SOCKET_ADDRESS.fullmatch(scalar.text)
    if not found or int(found[3]) > 65535:
        raise ValueError(f'expected "10.0.0.1:15008" or "[fd00::1]:15008", got {_quote(scalar.text)}')
    address = _address(Scalar(found[1] or found[2], plain=False))
    if (address.version == 6) != bool(found[1]):
        raise ValueError(f'expected brackets around IPv6 only, as in "[fd00::1]:15008", got {_quote(scalar.text)}')
    return address, int(found[3])


def _choice(values: type[E], scalar: Scalar) -> E:
    for value in values:
        if value.value == scalar.text:
            return value
    raise ValueError(f"expected {' or '.join(str(value.value) for value in values)}, got {_quote(scalar.text)}")


string = Kind(_string, "")
label = Kind(_label, "")
boolean = Kind(_boolean, False)
address = Kind(_address, ip_address("0.0.0.0"))
ports = Kind(_ports, (1, 1))
socket_address: Kind[SocketAddress] = Kind(_socket_address, (ip_address("0.0.0.0"), 1))


def integer(low: int, high: int) -> Kind[int]:
    return Kind(partial(_integer, low, high), low)


def duration(low: float, high: float) -> Kind[float]:
    """Seconds, between `low` and `high`."""
    return Kind(partial(_duration, low, high), low)


def choice(values: type[E]) -> Kind[E]:
    return Kind(partial(_choice, values), next(iter(values)))


# Digits are spelled [0-9]: \d would take every script's digits. No leading zero: half the world reads 0600 as octal.
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_DURATION = re.compile(r"(0|[1-9][0-9]{0,8})(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")
_SOCKET_ADDRESS = re.compile(r"(?:\[([^]]+)]|([^]:[]+)):([1-9][0-9]{0,4})")
# What YAML 1.2 (core schema, section 10.3.2) would not read as a string; its `no`, `on` and `y` are strings.
_NOT_A_STRING = re.compile(
    r"|~|null|Null|NULL|true|True|TRUE|false|False|FALSE|0o[0-7]+|0x[0-9a-fA-F]+"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BROKEN = "!broken"  # tag of nodes whose problem is already noted


class _Notes:
    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []

    def add(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.source, line, text))


def _compose(text: str, notes: _Notes) -> yaml.Node | None:
    """The node tree of the one document, or None with the reason noted."""
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        notes.add(1, f"document is larger than {MAX_BYTES} bytes; split it")
        return None
    try:
        loader = _Composer(text, notes)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        notes.add(line, f"not valid YAML: character U+{ord(text[error.position]):04X} is not allowed; remove it")
        return None
    try:
        node = loader.get_node() if loader.check_node() else None
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value and node.tag != _BROKEN):
            notes.add(1, "document is empty; write at least its required keys")
            return None
        if loader.check_node():
            notes.add(_line(loader.upcoming()), "a second document starts here; keep one document per file")
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        notes.add(mark.line + 1, f"not valid YAML: {error.problem or error.context}; correct this line first")
    except (ValueError, OverflowError):  # PyYAML 6 lets chr() and int() raise: "\UFFFFFFFF", %YAML 1.999...9
        notes.add(loader.get_mark().line + 1, "not valid YAML: number out of range; correct this line first")
    return None


class _Composer(yaml.SafeLoader):
    """Notes what we refuse of YAML while composing: anchors, aliases, tags; and stops at depth."""

    def __init__(self, text: str, notes: _Notes) -> None:
        super().__init__(text)
        self._notes = notes
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.upcoming()
        if self._depth >= MAX_DEPTH:
            text = f"nested deeper than {MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, text, event.start_mark)  # type: ignore[arg-type]
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:  # an AliasEvent's anchor is what it names
            self._notes.add(_line(event), "anchors and aliases are not allowed; write the value out")
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_BROKEN, "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag is not None:
                self._notes.add(_line(event), f"tags are not allowed; remove {_quote(event.tag)}")
            event.anchor = event.tag = None  # refused already; left in place they would make the composer stop early
        self._depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[arg-type]  # the stub knows only list indexes
        finally:
            self._depth -= 1

    def upcoming(self) -> yaml.Event:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        return event


def _line(marked: yaml.Node | yaml.Event) -> int:
    return marked.start_mark.line + 1 if marked.start_mark else 0


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _quote(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {_quote(key)}; {hint}known keys are {', '.join(known)}"


def _expected_label(text: str) -> str:
    return f"expected a name of lower-case letters, digits and dashes (at most 63), got {_quote(text)}"
