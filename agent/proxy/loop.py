"""One epoll loop: descriptors, timers, nothing else. Not asyncio: its TLS transport costs half the throughput."""

from __future__ import annotations

import heapq
import itertools
import select
import ssl
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from agent.proxy import engine

if TYPE_CHECKING:
    from agent.proxy._engine import Lane

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
ERROR = select.EPOLLERR
HANGUP = select.EPOLLHUP  # both directions have ended, perhaps with bytes still to be read
EDGE = select.EPOLLET
EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)

Handler = Callable[[int], None]
Task = Callable[[], None]


class Timer:
    """Hold it to cancel it."""

    __slots__ = ("task",)

    def __init__(self, task: Task) -> None:
        self.task: Task | None = task

    def cancel(self) -> None:
        self.task = None


class Loop:
    """Handlers get the event mask as a hint only: it is level-triggered, and an earlier handler of the same batch may
    have done the work. A handler must live with EAGAIN."""

    def __init__(self, failed: Callable[[int, Exception], None]) -> None:
        """`failed` is told of what no handler planned for, after its descriptor was forgotten; a timer has -1."""
        self._failed = failed
        self._epoll = select.epoll()
        self._engine = engine.make(self._epoll.fileno())
        self._handlers: dict[int, Handler] = {}
        self._fresh: set[int] = set()  # watched since the last wait: an event of that number is another descriptor's
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self.woke_ns = time.monotonic_ns()  # when this batch of events was known to be ready
        self.stopped = False

    @property
    def compiled(self) -> bool:
        return self._engine is not None

    def lane(self, tls: ssl.SSLSocket) -> Lane | None:
        """The compiled way for one TLS connection; see agent/proxy/engine.py."""
        return engine.lane(self._engine, tls)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        self._handlers[fd] = handler
        self._fresh.add(fd)
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed."""
        if self._engine is not None:
            self._engine.forget(fd)
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, task: Task) -> Timer:
        timer = Timer(task)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def every(self, seconds: float, task: Task) -> None:
        def again() -> None:
            self.after(seconds, again)
            task()

        self.after(seconds, again)

    def run(self) -> None:
        while not self.stopped:
            self.run_once()

    def run_once(self) -> None:
        self._fresh.clear()
        events = self._wait(self._until_next_timer())
        handlers, fresh = self._handlers, self._fresh
        for fd, task, detail in events:
            step = task or (handlers.get(fd) if fd not in fresh else None)
            if step is not None:
                try:
                    step(detail)
                except Exception as error:  # noqa: BLE001 - a defect met by one connection must not end the others
                    self.forget(fd)
                    self._failed(fd, error)
        self._run_timers()

    def _wait(self, seconds: float) -> Sequence[tuple[int, Callable[[Any], None] | None, Any]]:
        """(descriptor, None, mask), and from the engine also (descriptor, task, detail): what it leaves to Python."""
        if self._engine is not None:
            events = self._engine.wait(seconds)
            self.woke_ns = self._engine.woke_ns
            return events
        ready = self._epoll.poll(seconds)
        self.woke_ns = time.monotonic_ns()
        return [(fd, None, mask) for fd, mask in ready]

    def _until_next_timer(self) -> float:
        while self._timers and self._timers[0][2].task is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return 1.0
        return min(1.0, max(0.0, self._timers[0][0] - time.monotonic()))

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            task, timer.task = timer.task, None
            if task is not None:
                try:
                    task()
                except Exception as error:  # noqa: BLE001 - see run_once
                    self._failed(-1, error)
