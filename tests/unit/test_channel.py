"""Messages between roles."""

from __future__ import annotations

import os

import pytest

from agent import channel


def test_a_message_and_its_body_arrive_whole() -> None:
    near, far = channel.pair(1 << 16)
    body = os.urandom(3 << 20)  # far more than a datagram holds: it travels in a memory file
    assert channel.send(near, {"type": "snapshot"}, body)
    assert channel.receive(far) == ({"type": "snapshot"}, body)
    assert channel.receive(far) is None


def test_a_reader_that_does_not_keep_up_is_told_to_the_sender() -> None:
    near, _far = channel.pair(1 << 14)
    assert not all(channel.send(near, {"type": "outcome", "pad": "x" * 1000}) for _ in range(1000))


def test_the_end_of_the_other_side_is_an_error_and_not_a_message() -> None:
    near, far = channel.pair(1 << 14)
    far.close()
    with pytest.raises(ConnectionResetError):
        channel.receive(near)
    assert not channel.send(near, {"type": "beat"})


def test_no_descriptor_is_left_open() -> None:
    near, far = channel.pair(1 << 16)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        channel.send(near, {}, b"body")
        channel.receive(far)
    assert len(os.listdir("/proc/self/fd")) == before
