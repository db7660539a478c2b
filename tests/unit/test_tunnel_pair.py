"""Two tunnels, random commands, random delivery: honest peers never see a violation and always agree in the end."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.tunnel import events as ev
from agent.tunnel.events import Event
from agent.tunnel.frames import FrameType, Refusal, RefusedReason, ResetReason, data_header_into
from agent.tunnel.opening import Opening
from agent.tunnel.stream import Phase, Role, Tunnel
from policy.identity import SpiffeId

OPENING = Opening(
    bytes(16), (IPv4Address("10.1.0.5"), 1), (IPv4Address("10.9.0.1"), 2), SpiffeId("m", "a", "b"), "s", None, 0
)


class End:
    """One side: the machine, what it still owes, and what it sent and got in the current stream."""

    def __init__(self, role: Role) -> None:
        self.tunnel = Tunnel(role)
        self.outgoing = bytearray()
        self.pongs_due: list[bytes] = []
        self.refusal_due: Refusal | None = None
        self.sent: list[bytearray] = []  # by stream: the opener can be in the next one while the last still arrives
        self.got = bytearray()
        self.reset_by_us = False
        self.streams_ended = 0

    def begin(self) -> None:
        self.sent.append(bytearray())
        self.got.clear()
        self.reset_by_us = False

    def write(self, data: bytes | bytearray) -> None:
        self.outgoing += data

    def send_data(self, payload: bytes) -> None:
        buffer = bytearray(4) + payload
        data_header_into(buffer, len(payload))
        self.write(buffer)
        self.sent[-1] += payload

    def last_frame(self, reset: bool) -> None:
        if reset or self.tunnel.owes_reset:
            self.write(self.tunnel.reset(ResetReason.APPLICATION))
            self.reset_by_us = True
        else:
            self.write(self.tunnel.eof())
        self.count_if_ended()

    def count_if_ended(self) -> None:
        self.streams_ended += self.tunnel.idle

    def answer_offer(self, accept: bool) -> None:
        if accept and self.refusal_due is None:
            self.write(self.tunnel.opened())
        else:
            self.write(self.tunnel.refused(self.refusal_due or Refusal(RefusedReason.DENIED)))
        self.refusal_due = None


class Pair(RuleBasedStateMachine):
    """`number` picks the side: 0 is the opener."""

    @initialize(streaming=st.sampled_from([True, True, True, False]))
    def connect(self, streaming: bool) -> None:
        self.ends = (End(Role.OPENER), End(Role.ACCEPTOR))
        self.next_byte = 0
        if streaming:  # most of the rules are about this state, and a random walk seldom gets here
            self.opens()
            self.delivers(0, 1 << 20)
            self.answers(True)
            self.delivers(1, 1 << 20)

    sides = st.integers(0, 1)

    @precondition(lambda self: self.ends[0].tunnel.idle and not self.ends[0].tunnel.going_away)
    @rule()
    def opens(self) -> None:
        self.ends[0].begin()
        self.ends[0].write(self.ends[0].tunnel.open(OPENING))

    @precondition(lambda self: self.ends[1].tunnel.phase is Phase.OPENING)
    @rule(accept=st.sampled_from([True, True, True, False]))
    def answers(self, accept: bool) -> None:
        self.ends[1].answer_offer(accept)

    @rule(number=sides, size=st.integers(1, 30))
    def sends(self, number: int, size: int) -> None:
        if self.ends[number].tunnel.can_send:
            self.ends[number].send_data(bytes((self.next_byte + i) % 256 for i in range(size)))
            self.next_byte += size

    @rule(number=sides, reset=st.booleans())
    def ends_its_direction(self, number: int, reset: bool) -> None:
        tunnel = self.ends[number].tunnel
        if tunnel.streaming and not tunnel.sent_last:
            self.ends[number].last_frame(reset)

    @rule(number=sides, luck=st.integers(0, 4))
    def goes_away(self, number: int, luck: int) -> None:
        tunnel = self.ends[number].tunnel
        if luck == 0 and not tunnel.dropped and not tunnel._goaway_sent:
            self.ends[number].write(tunnel.goaway())

    @rule(number=sides, token=st.binary(min_size=8, max_size=8))
    def pings(self, number: int, token: bytes) -> None:
        tunnel = self.ends[number].tunnel
        if not tunnel.dropped and not tunnel.awaits_pong:
            self.ends[number].write(tunnel.ping(token))

    @rule(number=sides)
    def pongs(self, number: int) -> None:
        end = self.ends[number]
        while end.pongs_due:
            end.write(end.tunnel.pong(end.pongs_due.pop()))

    @rule(number=sides, luck=st.integers(0, 19))
    def drops(self, number: int, luck: int) -> None:
        """The abort that is left after EOF. Bytes on their way are lost or not; the peer notices when it notices."""
        tunnel = self.ends[number].tunnel
        if luck == 0 and tunnel.streaming and tunnel.sent_last:
            tunnel.drop()

    @rule(number=sides, size=st.sampled_from([1, 4, 13, 1 << 20, 1 << 20]))
    def delivers(self, number: int, size: int) -> None:
        sender, receiver = self.ends[number], self.ends[1 - number]
        chunk = bytes(sender.outgoing[:size])
        del sender.outgoing[:size]
        for event in receiver.tunnel.receive(memoryview(chunk)):
            self.takes(receiver, sender, event)
        if sender.tunnel.dropped and not sender.outgoing:
            receiver.tunnel.drop()

    def takes(self, end: End, peer: End, event: Event) -> None:
        assert event[0] != ev.VIOLATION, event
        stream = len(end.sent) - 1
        if event[0] in (ev.OPEN, ev.MUST_REFUSE):
            end.begin()
            end.refusal_due = event[1] if isinstance(event[1], Refusal) else None
        elif event[0] == ev.DATA:
            assert not end.reset_by_us
            end.got += event[1]
            assert peer.sent[stream].startswith(end.got)
        elif event[0] == ev.EOF and not end.reset_by_us:
            assert end.got == peer.sent[stream]
        elif event[0] == ev.PING:
            end.pongs_due.append(event[1])
        elif event[0] == ev.ENDED:
            end.streams_ended += 1

    @invariant()
    def buffers_stay_small(self) -> None:
        assert all(end.tunnel.buffered < 4100 for end in getattr(self, "ends", ()))

    def teardown(self) -> None:
        """Let everything arrive and every side do what it owes: both end idle, or both dropped."""
        if not hasattr(self, "ends"):
            return
        for _ in range(6):
            for number, end in enumerate(self.ends):
                self.delivers(number, 1 << 20)
                if end.tunnel.dropped:
                    continue
                self.pongs(number)
                if end.tunnel.role is Role.ACCEPTOR and end.tunnel.phase is Phase.OPENING:
                    end.answer_offer(accept=True)
                if end.tunnel.streaming and not end.tunnel.sent_last:
                    end.last_frame(reset=False)
        phases = {end.tunnel.phase for end in self.ends}
        assert phases in ({Phase.IDLE}, {Phase.DROPPED})
        if phases == {Phase.IDLE}:
            assert self.ends[0].streams_ended == self.ends[1].streams_ended


Pair.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestPair = Pair.TestCase


def test_frame_numbers_are_event_numbers() -> None:
    assert all(getattr(ev, kind.name) == kind for kind in FrameType)
