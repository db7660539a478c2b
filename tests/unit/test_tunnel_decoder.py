"""Bytes to frames: any chunking, bounded memory, no copy of DATA."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel.decoder import Decoder, Frame
from agent.tunnel.frames import HEADER_BYTES, LIMITS, MAX_DATA, MAX_OPEN, FrameType, frame, header

Plain = tuple[int, bytes | str]


def feed(decoder: Decoder, pieces: Iterable[bytes]) -> list[Frame]:
    frames: list[Frame] = []
    for piece in pieces:
        frames += decoder.feed(memoryview(piece))
        assert decoder.buffered < HEADER_BYTES + MAX_OPEN
    return frames


def joined(frames: Iterable[Frame]) -> list[Plain]:
    """DATA in a row becomes one: its boundaries mean nothing."""
    plain: list[Plain] = []
    for kind, payload in frames:
        value = bytes(payload) if isinstance(payload, memoryview) else payload
        last = plain[-1][1] if plain and plain[-1][0] == kind == FrameType.DATA else None
        if isinstance(last, bytes) and isinstance(value, bytes):
            plain[-1] = (kind, last + value)
        else:
            plain.append((kind, value))
    return plain


def cut(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(place % (len(stream) + 1) for place in cuts)})
    return [stream[start:end] for start, end in pairwise(places)]


def payload_of(kind: FrameType) -> st.SearchStrategy[bytes]:
    smallest, largest = LIMITS[kind]
    return st.binary(min_size=smallest, max_size=min(largest, 60))


legal_frames = st.sampled_from(FrameType).flatmap(lambda kind: st.tuples(st.just(kind), payload_of(kind)))


@given(st.lists(legal_frames, max_size=12), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_chunking_gives_the_frames_that_were_sent(sent: list[tuple[FrameType, bytes]], cuts: list[int]) -> None:
    stream = b"".join(frame(kind, payload) for kind, payload in sent)
    expected = joined((kind, memoryview(body) if kind == FrameType.DATA else body) for kind, body in sent)
    decoder = Decoder()
    assert joined(feed(decoder, cut(stream, cuts))) == expected
    assert (decoder.failed, decoder.buffered) == (False, 0)


@given(st.binary(max_size=400), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_chunking_of_random_bytes_gives_the_same_frames_and_the_same_failure(
    stream: bytes, cuts: list[int]
) -> None:
    whole, pieces = Decoder(), Decoder()
    assert joined(feed(whole, [stream])) == joined(feed(pieces, cut(stream, cuts)))
    assert (whole.failed, whole.buffered) == (pieces.failed, pieces.buffered)


def test_whole_data_is_a_slice_of_the_input_and_nothing_is_kept() -> None:
    wire = frame(FrameType.DATA, b"hello")
    view = memoryview(wire)
    decoder = Decoder()
    payload = decoder.whole_data(view)
    assert payload is not None
    assert payload.obj is wire
    assert payload.tobytes() == b"hello"


@pytest.mark.parametrize(
    ("fed", "view"),
    [
        (b"", b""),
        (b"", b"\x04\x00\x00"),
        (b"", frame(FrameType.DATA, b"hello")[:-1]),
        (b"", frame(FrameType.DATA, b"hello") + b"\x05"),
        (b"", b"\x04\x00\x00\x00"),
        (b"", header(FrameType.DATA, MAX_DATA + 1) + bytes(MAX_DATA + 1)),
        (b"", frame(FrameType.PING, b"12345678")),
        (b"\x04", frame(FrameType.DATA, b"hello")),  # inside a header
        (b"\x04\x00\x00\x09", frame(FrameType.DATA, b"hello")),  # inside DATA: looks like a frame, is not one
        (b"\x08\x00\x00\x08", frame(FrameType.DATA, b"hello")),  # inside a PING
        (b"\xff\x00\x00\x08", frame(FrameType.DATA, b"hello")),  # after the failure
    ],
)
def test_the_fast_path_leaves_everything_else_alone(fed: bytes, view: bytes) -> None:
    decoder, untouched = Decoder(), Decoder()
    feed(decoder, [fed])
    feed(untouched, [fed])
    assert decoder.whole_data(memoryview(view)) is None
    assert joined(feed(decoder, [view])) == joined(feed(untouched, [view]))


def test_data_across_reads_goes_on_at_once_and_is_never_held() -> None:
    wire = frame(FrameType.DATA, bytes(MAX_DATA)) + frame(FrameType.EOF)
    decoder = Decoder()
    got = 0
    for piece in cut(wire, range(0, len(wire), 1000)):
        got += sum(len(payload) for kind, payload in decoder.feed(memoryview(piece)) if kind == FrameType.DATA)
        assert decoder.buffered <= HEADER_BYTES
    assert got == MAX_DATA


@pytest.mark.parametrize("kind", range(256))
def test_a_length_outside_the_limits_fails_at_the_header_before_any_payload(kind: int) -> None:
    smallest, largest = LIMITS.get(kind, (0, -1))
    for length in {largest + 1, 0xFFFFFF, *({smallest - 1} if smallest else ())}:
        decoder = Decoder()
        frames = feed(decoder, [(kind << 24 | length).to_bytes(4, "big")])
        assert joined(frames) == [(kind, f"frame type {kind} with {length} bytes does not exist")]
        assert (decoder.failed, decoder.buffered) == (True, 0)
        assert feed(decoder, [frame(FrameType.EOF), b"anything"]) == []


def test_frames_before_a_failure_are_delivered() -> None:
    frames = feed(Decoder(), [frame(FrameType.DATA, b"a") + frame(FrameType.EOF) + b"\xff\xff\xff\xff"])
    assert [kind for kind, _ in frames] == [FrameType.DATA, FrameType.EOF, 255]
