"""The reading end of a BPF ring buffer, by mmap and without bcc.

Source: kernel/bpf/ringbuf.c. One page with the consumer's position, one with the producer's, then the data, mapped
twice in a row so that no record is ever cut. Each record: a header of 8 bytes (length with two flag bits, page offset),
then the bytes, rounded up to 8.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from agent import bpfcall

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = 8
# Native ("@"), because these are read and written while the kernel does the same: CPython copies a native number in one
# piece and a standard one ("=") byte by byte.
_POSITION = struct.Struct("@Q")
_LENGTH = struct.Struct("@I")


class Ring:
    """`fd` is of the map; epoll on it tells when there is something to read. There can be one reader only."""

    def __init__(self, fd: int) -> None:
        page = mmap.PAGESIZE
        self._size = bpfcall.map_info(fd).max_entries
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)

    def read(self) -> list[bytes]:
        """Every record that is complete, oldest first."""
        return list(self._records())

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()

    def _records(self) -> Iterator[bytes]:
        """Each position is read once and before the records it covers. The kernel writes them with release semantics;
        the many instructions of the interpreter between two reads make their order safe in practice on arm64 too."""
        (position,) = _POSITION.unpack_from(self._consumer)
        (end,) = _POSITION.unpack_from(self._producer)
        while position < end:
            start = mmap.PAGESIZE + position % self._size
            (length,) = _LENGTH.unpack_from(self._producer, start)
            if length & _BUSY:
                return  # reserved and not yet submitted; what follows waits with it
            size = length & ~(_BUSY | _DISCARDED)
            if not length & _DISCARDED:
                yield self._producer[start + _HEADER : start + _HEADER + size]
            position += (_HEADER + size + 7) // 8 * 8
            _POSITION.pack_into(self._consumer, 0, position)
