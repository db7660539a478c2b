"""Plays systemd for one process: starts it, and starts it again whenever it ends (Restart=always)."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable

RESTART_S = 0.5  # RestartSec= of systemd is 0.1 by default; a little longer shows better what "down" looks like


class Keeper:
    def __init__(self, name: str, start: Callable[[], subprocess.Popen[str]]) -> None:
        self.restarts = 0
        self.started_at = time.monotonic()
        self._start = start
        self._stopping = threading.Event()
        self._process = start()
        # A daemon: a harness that crashes must be able to end, its cleanup finds the process by cgroup.
        self._thread = threading.Thread(target=self._keep, name=f"keep {name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self, within_s: float) -> int:
        """SIGTERM and wait; SIGKILL if that does not help. The exit status, negative for a signal."""
        self.let_go()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def let_go(self) -> None:
        """Never start it again; the process itself is left alone."""
        self._stopping.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            if not self._stopping.wait(RESTART_S):
                self.started_at = time.monotonic()
                self._process = self._start()
                self.restarts += 1
