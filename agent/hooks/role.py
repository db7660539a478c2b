"""The hooks role: one loop that keeps the kernel side as the snapshot wants it.

It decides nothing about connections and is not on their way: while it is dead the kernel goes on with its tables.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent import bpfcall, channel, host, netlink
from agent.config import Config
from agent.hooks import state
from agent.hooks.compile import Compilation
from agent.hooks.filler import Filler
from agent.hooks.keeper import Keeper
from agent.hooks.problem import Problem
from agent.hooks.site import find_site
from agent.hooks.sweep import sweep
from agent.hooks.who import Who
from agent.snapshot import decode
from policy.fields import Invalid

_BEAT_S = 1.0
_CGROUPS_S = 0.5
_CGROUPS_SHARE = 20  # walking the cgroups may take one part in this many of our time
_KEEP_S = 2.0
_SWEEP_S = 5.0
_ROUTES_S = 15.0
_LISTENERS_S = 1.0
_LISTENERS_SHARE = 50
_POLL_S = 0.05  # while a compilation runs
_COMPILE_AGAIN_S = 30.0
_SAY_AGAIN_S = 60.0
_SAY_CHARS = 4096  # a whole file of problems must not exceed a message
_QUESTIONS = 64  # answered in one go before anything else gets its turn


def main(config: Config, status: socket.socket, orders: socket.socket, who: list[socket.socket]) -> int:
    """Runs until SIGTERM (0, everything stays attached: protection outlives us) or until the supervisor is gone (1)."""
    try:
        with (
            state.lock(Path(config.state_dir)),
            contextlib.closing(Role(config, status, orders, who)) as role,
            _on_stop(role.stop),
        ):
            return role.run()
    except Problem as problem:
        channel.send(status, {"type": "problem", "text": str(problem)[:_SAY_CHARS]})
        return 1


class Role:
    def __init__(self, config: Config, status: socket.socket, orders: socket.socket, who: list[socket.socket]) -> None:
        self._config = config
        self._status = status
        self._orders = orders
        self._site = find_site(config)
        self._keeper = Keeper(self._site)
        self._filler = Filler(config)
        self._who = Who(self._site.mount)
        self._maps: dict[str, bpfcall.Map] = {}
        self._compilation: Compilation | None = None
        self._compile_after = 0.0
        self._may_attach = False
        self._attached = False
        self._troubled = False  # something was told since the last `ready`
        self._refused = False  # the latest snapshot could not be used
        self._counts = {"repairs": 0, "swept_reservations": 0, "swept_entries": 0, "generation": 0}
        self._said: dict[str, float] = {}
        self._exit: int | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(status, selectors.EVENT_READ, self._read_status)
        self._selector.register(orders, selectors.EVENT_READ, self._read_orders)
        for end in who:
            self._selector.register(end, selectors.EVENT_READ, self._read_who)
        self._changes = netlink.address_changes()
        self._selector.register(self._changes, selectors.EVENT_READ, self._read_changes)
        self._timers = [
            Timer(_BEAT_S, self._beat),
            Timer(_CGROUPS_S, self._look_at_cgroups, _CGROUPS_SHARE),
            Timer(_KEEP_S, self._keep),
            Timer(_SWEEP_S, self._sweep),
            Timer(_ROUTES_S, self._look_at_routes),
            Timer(_LISTENERS_S, self._look_at_listeners, _LISTENERS_SHARE),
        ]

    def stop(self) -> None:
        self._exit = 0

    def close(self) -> None:
        if self._compilation is not None:
            self._compilation.stop()
        self._keeper.close()
        self._who.close()
        self._changes.close()
        self._selector.close()

    def run(self) -> int:
        self._start()
        while self._exit is None:
            now = time.monotonic()
            for timer in self._timers:
                timer.run_if_due(now)
            self._watch_compilation()
            for key, _events in self._selector.select(self._pause()):
                key.data(key.fileobj)
        return self._exit

    def _start(self) -> None:
        """What an earlier agent left attached is live: take it over at once, before control has said anything."""
        note = self._keeper.open()
        if note:
            channel.send(self._status, {"type": "note", "text": note})
        self._may_attach = self._keeper.was_live()
        if self._keeper.has_maps():
            self._open_maps()
        self._filler.see(self._see_cgroups())
        channel.send(self._orders, {"type": "hello"})

    def _pause(self) -> float:
        if self._compilation is not None:
            return _POLL_S
        return max(0.0, min(timer.due for timer in self._timers) - time.monotonic())

    # --- programs and maps

    def _keep(self) -> None:
        with self._telling():
            if self._compilation is None and not self._keeper.is_loaded():
                self._compile()
            if self._compilation is not None or not self._may_attach or not self._maps:
                return
            done = self._keeper.keep(self._maps)
            if not self._attached:
                self._tell_ready()
            elif done:
                self._counts["repairs"] += len(done)
                self._say("repaired: " + ", ".join(done))
            elif self._troubled and not self._refused:
                self._tell_ready()

    def _tell_ready(self) -> None:
        """Also when trouble is over: the supervisor takes it as that."""
        self._attached = True
        self._troubled = not channel.send(self._status, {"type": "ready"})

    def _compile(self) -> None:
        if time.monotonic() >= self._compile_after:
            self._compilation = self._keeper.compile()

    def _watch_compilation(self) -> None:
        compilation = self._compilation
        if compilation is None:
            return
        with self._telling():
            try:
                if not compilation.poll():
                    return
            except Problem:
                self._compilation = None
                self._compile_after = time.monotonic() + _COMPILE_AGAIN_S
                raise
            self._compilation = None
            self._keeper.promote()
            self._open_maps()
            self._write_tables()
            self._keep()

    def _open_maps(self) -> None:
        self._maps = self._keeper.open_maps()
        self._keeper.write_settings(self._maps["settings"])
        self._filler.use(self._maps)
        channel.send(self._status, {"type": "maps"})  # whoever needs their descriptors can open them now

    # --- tables

    def _read_orders(self, orders: socket.socket) -> None:
        for message, body in self._messages(orders):
            if message.get("type") == "snapshot" and body is not None:
                self._take_snapshot(body)

    def _take_snapshot(self, body: bytes) -> None:
        self._refused = True
        try:
            snapshot = decode(body)
            with self._telling():
                remarks = self._filler.take(snapshot)
                self._refused = False
                self._counts["generation"] = snapshot.generation
                for remark in remarks:
                    self._say(remark)
                self._allow_attaching()
            self._look_at_listeners()
            self._cut()
        except (Invalid, ValueError, KeyError, TypeError, IndexError) as error:
            self._say(f"snapshot refused, the one before stays: {error}")

    def _allow_attaching(self) -> None:
        """The first tables are written before the programs go live: nothing is captured half-configured."""
        if not self._may_attach and self._maps:
            self._may_attach = True
            self._keep()

    def _write_tables(self) -> None:
        for remark in self._filler.write():
            self._say(remark)
        if self._filler.is_filled:
            self._allow_attaching()

    def _see_cgroups(self) -> dict[int, str]:
        found = host.cgroups(self._site.mount)
        self._who.learn(found)
        return found

    def _look_at_cgroups(self) -> None:
        with self._telling():
            if self._filler.see(self._see_cgroups()):
                self._write_tables()

    def _look_at_routes(self) -> None:
        with self._telling():
            if self._filler.ask_routes():
                self._write_tables()

    def _look_at_listeners(self) -> None:
        with self._telling():
            if self._filler.look():
                self._write_tables()
            self._filler.renew()

    def _cut(self) -> None:
        with self._telling():
            cut = self._filler.cut()
            if cut:
                text = f"{cut} direct connections cut: the policy does not allow them any more"
                channel.send(self._status, {"type": "note", "text": text})

    def _read_changes(self, changes: socket.socket) -> None:
        """An address has come or gone: one that is not ours any more must not be dialled directly."""
        try:
            while changes.recv(1 << 16):
                pass
        except OSError:
            pass  # nothing more; or more than was kept for us, which says the same
        self._look_at_listeners()

    def _sweep(self) -> None:
        if self._maps:
            swept = sweep(self._maps["flows"], self._site.max_flows, host.boottime_ns())
            self._counts["swept_reservations"] += swept.reservations
            self._counts["swept_entries"] += swept.entries

    # --- talking

    def _read_who(self, end: socket.socket) -> None:
        try:
            for _ in range(_QUESTIONS):
                received = channel.receive(end)
                if received is None:
                    return
                answer = self._who.answer(received[0])
                if answer is not None:
                    channel.send(end, answer)
        except ConnectionError:
            self._selector.unregister(end)  # one proxy has gone for good; the others go on asking
        except ValueError as error:
            self._say(f"a question from a proxy was not understood: {error}")

    def _read_status(self, status: socket.socket) -> None:
        for _ in self._messages(status):
            pass  # nobody orders anything here; what counts is whether the other end is there

    def _messages(self, end: socket.socket) -> Iterator[tuple[channel.Message, bytes | None]]:
        while self._exit is None:
            try:
                received = channel.receive(end)
            except ConnectionError:
                self._exit = 1
                return
            except ValueError as error:
                self._say(f"a message was not understood: {error}")
                continue
            if received is None:
                return
            yield received

    def _beat(self) -> None:
        channel.send(self._status, {"type": "beat", "attached": self._attached, **self._counts})

    def _say(self, text: str) -> None:
        """A named problem to the supervisor; the same one again only after a while."""
        self._troubled = True
        now = time.monotonic()
        if now >= self._said.get(text, 0.0):
            self._said = {each: until for each, until in self._said.items() if until > now}
            self._said[text] = now + _SAY_AGAIN_S
            channel.send(self._status, {"type": "problem", "text": text[:_SAY_CHARS]})

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A Problem is told and tried again when its timer comes round."""
        try:
            yield
        except Problem as problem:
            self._say(str(problem))
        except OSError as error:
            self._say(f"the kernel refused a step: {error}; it is tried again")


class Timer:
    """Runs its action every `every` seconds, or less often when the action takes more than one part in `share`."""

    def __init__(self, every: float, action: Callable[[], None], share: int = 0) -> None:
        self._every = every
        self._action = action
        self._share = share
        self.due = 0.0

    def run_if_due(self, now: float) -> None:
        if now < self.due:
            return
        started = time.monotonic()
        self._action()
        ended = time.monotonic()
        self.due = ended + max(self._every, self._share * (ended - started))


@contextlib.contextmanager
def _on_stop(stop: Callable[[], None]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
