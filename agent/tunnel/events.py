"""What a tunnel tells the relay: (kind, payload), plain tuples, because one is made for every message carried.

Kinds that stand for a frame have the frame's number. The payload's type follows from the kind, and mypy knows it:
`if event[0] == DATA: write(event[1])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from agent.tunnel.frames import Refusal, ResetReason
from agent.tunnel.opening import Opening

OPEN: Final = 1  # acceptor: decide, dial, then opened() or refused()
OPENED: Final = 2  # opener: the stream flows
REFUSED: Final = 3  # opener: no stream; the tunnel is idle
DATA: Final = 4  # bytes for the application; the slice lives as long as the read buffer does
EOF: Final = 5  # the peer sends no more; close our writing side towards the application
RESET: Final = 6  # the peer cut the stream; discard, and answer with reset() if `owes_reset`
GOAWAY: Final = 7  # the peer wants no stream after this one
PING: Final = 8  # answer with pong(payload)
PONG: Final = 9  # the answer to our ping
ENDED: Final = 16  # both sides have sent their last frame; the tunnel is idle
VIOLATION: Final = 17  # close the connection; the last event ever
MUST_REFUSE: Final = 18  # acceptor: an OPEN that cannot become a stream; answer with refused(payload)

Event = (
    tuple[Literal[1], Opening]
    | tuple[Literal[2, 5, 7, 16], None]
    | tuple[Literal[3, 18], Refusal]
    | tuple[Literal[4], memoryview]
    | tuple[Literal[6], ResetReason]
    | tuple[Literal[8, 9], bytes]
    | tuple[Literal[17], str]
)
Events = Sequence[Event]
