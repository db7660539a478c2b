"""Messages between the agent's roles: JSON datagrams over unix socket pairs the supervisor made, files beside them.

The supervisor keeps both ends of every pair open, so a role that dies leaves its channel to its successor and nothing
queued is lost. SOCK_SEQPACKET keeps message borders: a sender killed half-way leaves no half message.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Iterable, Mapping
from typing import Any

_SO_SNDBUFFORCE = 32  # include/uapi/asm-generic/socket.h; Python has no name for it
MAX_MESSAGE = 64 * 1024
MAX_FILES = 4
MAX_FILE_BYTES = 64 * 1024 * 1024

Message = dict[str, Any]


def pair(buffer_bytes: int) -> tuple[socket.socket, socket.socket]:
    """`buffer_bytes` is how much may wait unread; without privilege the kernel caps it at net.core.wmem_max."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (left, right):
        end.setblocking(False)
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, buffer_bytes)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return left, right


def send(channel: socket.socket, message: Mapping[str, Any], body: bytes | None = None) -> bool:
    """Send one message, with `body` in a memory file when given; False when it could not be sent now: the peer does not
    keep up or is gone, or there is no descriptor or memory left."""
    data = json.dumps(message).encode()
    with contextlib.ExitStack() as stack:
        files: list[int] = []
        try:
            if body is not None:
                files.append(os.memfd_create(f"underpass-{message.get('type', 'body')}"))
                stack.callback(os.close, files[0])
                _write_all(files[0], body)
            socket.send_fds(channel, [data], files)
        except OSError:
            return False
    return True


def receive(channel: socket.socket) -> tuple[Message, bytes | None] | None:
    """The next message and its body; None when there is none now. ConnectionResetError when the peer is gone,
    ValueError when it is no message: a role that was taken over must not be able to make the others fall.

    A body gets lost when the reader has no descriptor left for it (recvmsg(2), MSG_CTRUNC).
    """
    try:
        data, files, _flags, _address = socket.recv_fds(channel, MAX_MESSAGE, MAX_FILES)
    except BlockingIOError:
        return None
    try:
        if not data and _hung_up(channel):
            raise ConnectionResetError("the other end of the channel is closed")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("a message of a role is not a JSON object")
        return message, _read_all(files[0]) if files else None
    finally:
        _close_all(files)


def _hung_up(channel: socket.socket) -> bool:
    """Nothing read can also be an empty datagram, which anybody can send."""
    poll = select.poll()
    poll.register(channel, select.POLLHUP)
    return any(mask & select.POLLHUP for _, mask in poll.poll(0))


def _write_all(fd: int, body: bytes) -> None:
    view = memoryview(body)
    while view:
        view = view[os.write(fd, view) :]


def _read_all(fd: int) -> bytes:
    size = min(os.fstat(fd).st_size, MAX_FILE_BYTES)
    return os.pread(fd, size, 0)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
