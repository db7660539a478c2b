"""tcpdump on the veth pair, and what it saw."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.world import place
from tests.world.enter import Place
from tests.world.mesh import TUNNEL_PORT
from tests.world.names import INTERFACE
from tests.world.pcap import Packet, read_pcap
from tests.world.wait import until
from tests.world.wire import WireReport, inspect

_DROPPED = re.compile(r"(\d+) packets? dropped by kernel")
_SEND = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(bytes.fromhex(sys.argv[1]), (sys.argv[2], 9))"
_TAIL = 1 << 16
STOP_S = 10


class Capture:
    """`other_end`: an address across the wire, for the packet that marks the end."""

    def __init__(self, where: Place, file: Path, other_end: str) -> None:
        self.file = file
        self._where = where
        self._other_end = other_end
        self._marker = os.urandom(16)
        # A large buffer, so that nothing is dropped under load; -U, so that a killed tcpdump has written what it saw;
        # -Z root, because as its own user it could not write here.
        options = ["-i", INTERFACE, "-s", "0", "-U", "-B", "65536", "-Z", "root", "-w", str(file)]
        self._process = place.spawn(where, ["tcpdump", *options], stderr=place.PIPE)
        self._wait_listening()

    def finish(self, needles: Sequence[bytes] = ()) -> WireReport:
        """End the recording and judge it."""
        self._mark_end()
        dropped = self._stop()
        return inspect(self._packets(), TUNNEL_PORT, needles, dropped)

    def _wait_listening(self) -> None:
        """Only a capture that has begun proves anything about what comes next."""
        said = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            said.append(line)
            if "listening on" in line:
                return
        raise OSError(f"tcpdump did not start: {''.join(said).strip()}")

    def _mark_end(self) -> None:
        """tcpdump ends at once on a signal and forgets what the kernel still holds for it. So a packet of our own is
        sent last: once that is in the file, everything before it is."""
        place.run(self._where, [place.PYTHON, "-c", _SEND, self._marker.hex(), self._other_end], check=True)
        until(self._has_marker, STOP_S, "the last packet of the capture")

    def _has_marker(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(max(0, self.file.stat().st_size - _TAIL))
            return self._marker in file.read()

    def _stop(self) -> int:
        """How many packets the kernel dropped: any at all makes the capture worthless as a proof."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=STOP_S)
        found = _DROPPED.search(said)
        if self._process.returncode or not found:
            raise OSError(f"tcpdump failed: {said.strip()}")
        return int(found.group(1))

    def _packets(self) -> list[Packet]:
        packets = read_pcap(self.file.read_bytes())
        end = next(index for index, packet in enumerate(packets) if self._marker in packet.raw)
        return packets[:end]
