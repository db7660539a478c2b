"""Bytes of a tunnel -> frames. DATA is never held: each piece goes on as a slice of what was read."""

from __future__ import annotations

from agent.tunnel.frames import DATA_WORD, HEADER, HEADER_BYTES, LIMITS, MAX_DATA, FrameType

# A frame is (type, payload): memoryview for DATA (any piece of a frame, never empty), bytes for every other type.
# str means that the bytes are not frames: it says why, it is the last one ever, and its number means nothing.
Frame = tuple[int, memoryview | bytes | str]

MAX_WHOLE = HEADER_BYTES + MAX_DATA
_DATA_LESS_HEADER = DATA_WORD - HEADER_BYTES  # plus the size of a whole DATA frame = its header word
_DATA = int(FrameType.DATA)  # a plain int: reading a member of an enum costs three times as much
_read_word = HEADER.unpack_from


class Decoder:
    """Feed it what arrives, in any pieces. It holds at most one control frame (`buffered` bytes)."""

    __slots__ = ("_data_left", "_held", "_wanted", "failed")

    def __init__(self) -> None:
        self.failed = False
        self._data_left = 0  # bytes still to come of a DATA frame
        self._held = bytearray()  # the beginning of a header or of a control frame
        self._wanted = HEADER_BYTES  # size of `_held` at which it can be judged

    @property
    def buffered(self) -> int:
        return len(self._held)

    def whole_data(self, view: memoryview) -> memoryview | None:
        """The payload if `view` is exactly one DATA frame, the usual case; else None, and nothing has changed."""
        size = len(view)
        if (
            HEADER_BYTES < size <= MAX_WHOLE
            and not self._data_left
            and _read_word(view)[0] == _DATA_LESS_HEADER + size
            and not self._held
            and not self.failed
        ):
            return view[HEADER_BYTES:]
        return None

    def feed(self, view: memoryview) -> list[Frame]:
        """Every frame, and piece of a DATA frame, that is now known. DATA slices live as long as the input does."""
        frames: list[Frame] = []
        at, size = 0, len(view)
        while at < size and not self.failed:
            if self._data_left:
                end = min(size, at + self._data_left)
                self._data_left -= end - at
                frames.append((_DATA, view[at:end]))
                at = end
            elif self._held or size - at <= HEADER_BYTES:
                at = self._hold(view, at, frames)
            elif 0 < (length := _read_word(view, at)[0] - DATA_WORD) <= MAX_DATA:
                self._data_left = length
                at += HEADER_BYTES
            else:
                at = self._hold(view, at, frames)
        return frames

    def _hold(self, view: memoryview, at: int, frames: list[Frame]) -> int:
        """Keep bytes until there is a header, then until there is a frame; never more than that."""
        end = min(len(view), at + self._wanted - len(self._held))
        self._held += view[at:end]
        if len(self._held) == HEADER_BYTES:
            self._judge_header(frames)
        if len(self._held) == self._wanted:
            frames.append((self._held[0], bytes(self._held[HEADER_BYTES:])))
            self._release()
        return end

    def _judge_header(self, frames: list[Frame]) -> None:
        """Before any payload is kept: an unknown type or a lying length must not make us hold a byte more."""
        word: int = HEADER.unpack(self._held)[0]
        kind, length = word >> 24, word & 0xFFFFFF
        smallest, largest = LIMITS.get(kind, (0, -1))
        self._wanted = HEADER_BYTES + length
        if not smallest <= length <= largest:
            self.failed = True
            self._release()
            frames.append((kind, f"frame type {kind} with {length} bytes does not exist"))
        elif kind == FrameType.DATA:
            self._data_left = length
            self._release()

    def _release(self) -> None:
        self._held.clear()
        self._wanted = HEADER_BYTES
