"""Frames on the wire: fixed bytes, limits, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel import frames, opening
from agent.tunnel.frames import FrameType, Refusal, RefusedReason, ResetReason

WIRE = [
    (FrameType.OPENED, b"", "02000000"),
    (FrameType.EOF, b"", "05000000"),
    (FrameType.RESET, b"\x02", "0600000102"),
    (FrameType.GOAWAY, b"", "07000000"),
    (FrameType.PING, b"12345678", "080000083132333435363738"),
    (FrameType.PONG, b"12345678", "090000083132333435363738"),
    (FrameType.DATA, b"hello", "0400000568656c6c6f"),
]


@pytest.mark.parametrize(("kind", "payload", "wire"), WIRE)
def test_a_frame_is_type_24_bit_length_payload(kind: FrameType, payload: bytes, wire: str) -> None:
    assert frames.frame(kind, payload).hex() == wire


@pytest.mark.parametrize("kind", list(FrameType))
def test_a_payload_beyond_the_limits_of_its_type_is_not_built(kind: FrameType) -> None:
    smallest, largest = frames.LIMITS[kind]
    assert len(frames.frame(kind, bytes(largest))) == frames.HEADER_BYTES + largest
    with pytest.raises(ValueError, match="carries"):
        frames.frame(kind, bytes(largest + 1))
    if smallest:
        with pytest.raises(ValueError, match="carries"):
            frames.frame(kind, bytes(smallest - 1))


@given(st.binary(min_size=1, max_size=300), st.integers(0, 8))
def test_a_header_written_in_place_makes_the_same_frame(payload: bytes, offset: int) -> None:
    buffer = bytearray(offset + 4) + payload
    frames.data_header_into(buffer, len(payload), offset)
    assert buffer[offset:] == frames.frame(FrameType.DATA, payload)


@pytest.mark.parametrize("length", [-1, 0, frames.MAX_DATA + 1])
def test_a_data_header_of_an_illegal_length_is_not_written(length: int) -> None:
    buffer = bytearray(4)
    with pytest.raises(ValueError, match="1 to 65536 bytes"):
        frames.data_header_into(buffer, length)
    assert buffer == bytes(4)


def test_a_full_record_of_data_fits_one_tls_record() -> None:
    assert frames.HEADER_BYTES + frames.RECORD_DATA == 16384


def test_a_refusal_has_reason_errno_and_text() -> None:
    refusal = Refusal(RefusedReason.CONNECT_REFUSED, 111, "nobody listens")
    payload = frames.refused_payload(refusal)
    assert payload == b"\x03\x00\x6fnobody listens"
    assert frames.parse_refused(payload) == refusal


@given(st.builds(Refusal, st.sampled_from(RefusedReason), st.integers(0, 0xFFFF), st.text(max_size=300)))
def test_any_refusal_text_becomes_printable_and_short(refusal: Refusal) -> None:
    payload = frames.refused_payload(refusal)
    parsed = frames.parse_refused(payload)
    assert len(payload) <= frames.LIMITS[FrameType.REFUSED][1]
    assert (parsed.reason, parsed.errno) == (refusal.reason, refusal.errno)
    assert frames.refused_payload(parsed) == payload


@pytest.mark.parametrize("payload", [b"\x00\x00\x00", b"\x0c\x00\x00", b"\x01\x00\x00\xff", b"\x01\x00\x00a\nb"])
def test_a_refusal_that_could_not_be_logged_is_not_read(payload: bytes) -> None:
    with pytest.raises(ValueError):
        frames.parse_refused(payload)


SPECIFICATION = (Path(__file__).parents[2] / "docs" / "tunnel.md").read_text()


def test_the_table_of_the_specification_is_what_we_enforce() -> None:
    rows = re.findall(r"^\| (\d) \| ([A-Z]+) \| (\d+)\.\.(\d+) \|", SPECIFICATION, re.MULTILINE)
    assert {FrameType[name]: (int(low), int(high)) for _, name, low, high in rows} == dict(frames.LIMITS)
    assert all(FrameType[name] == int(number) for number, name, _, _ in rows)


@pytest.mark.parametrize(("title", "reasons"), [("Refused", RefusedReason), ("Reset", ResetReason)])
def test_the_reasons_of_the_specification_are_ours(title: str, reasons: type[RefusedReason | ResetReason]) -> None:
    sentence = SPECIFICATION.split(f"\n{title} reasons: ")[1].split(".")[0]
    assert re.findall(r"(\d+)\s+([a-z_]+)", sentence) == [(str(int(each)), each.name.lower()) for each in reasons]


def test_the_worked_example_of_the_specification_is_true() -> None:
    example = SPECIFICATION.split("### Example")[1].split("Nobody listens")[0]
    wire = bytes.fromhex("".join(re.findall(r"^    ((?:[0-9a-f]{2} ?)+?)(?:  |$)", example, re.MULTILINE)))
    value = opening.decode(wire[frames.HEADER_BYTES :])
    assert wire == frames.frame(FrameType.OPEN, opening.encode(value))
    assert (str(value.identity.short), value.service, value.destination[1]) == ("a/ledger", "accounts", 5432)
