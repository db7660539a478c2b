"""What the hooks add to connect(): a governed client at a captured and at an uncaptured address, and one without hooks.

The proxies of the client's host stand still meanwhile (SIGSTOP): a captured connection wakes them, and their work on
the next core is not the hook's. A connect() ends when the kernel has answered the SYN; nobody has to accept.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from tests.bench.arms import Underpass
from tests.bench.load import Client
from tests.bench.process import settle
from tests.bench.record import Figures
from tests.bench.stage import Stage
from tests.bench.works import CAPTURED, NONE, UNCAPTURED, Plan, rotated

BATCHES = 3
FREE = "free"


def measure_hook(stage: Stage, underpass: Underpass, plan: Plan) -> dict[tuple[str, str], Figures]:
    """By (arm, work). Batches alternate, so that all three see the same minute."""
    found: dict[str, list[float]] = {FREE: [], UNCAPTURED: [], CAPTURED: []}
    for batch in range(BATCHES):
        settle(underpass.pids)
        with stage.deaf() as nobody, _standing_still(underpass.proxy_pids()):
            clients = {
                FREE: stage.free_client(nobody),
                UNCAPTURED: stage.client(nobody),
                CAPTURED: underpass.client(),
            }
            for name in rotated(list(clients), batch):
                found[name].append(_connect(clients[name], plan.connects))
    settle(underpass.pids)
    free = {"connect_us": median(found.pop(FREE))}
    ours = {(underpass.name, name): {"connect_us": median(values)} for name, values in found.items()}
    return {(NONE, CAPTURED): free, (NONE, UNCAPTURED): free, **ours}


def _connect(client: Client, times: int) -> float:
    return float(client.run("connect", count=times)["p50_us"])


@contextmanager
def _standing_still(pids: list[int]) -> Iterator[None]:
    stopped = []
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
