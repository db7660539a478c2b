"""Memory of an arm: freshly started, and with connections open that do nothing."""

from __future__ import annotations

from tests.bench.arms import Arm
from tests.bench.load import Running
from tests.bench.process import pss_bytes, settle
from tests.bench.record import Figures
from tests.bench.works import Plan

MB = 1_000_000
PER = 10_000  # connections


def measure_idle(arm: Arm, plan: Plan) -> Figures:
    """The arm must have been started just now."""
    settle(arm.pids)
    at_start = pss_bytes(arm.pids())
    options = {"connections": plan.idle.connections, "size": plan.idle.size, "seconds": plan.idle_seconds}
    with Running(arm.client(), "idle", options) as holding:
        settle(arm.pids)
        held = pss_bytes(arm.pids())
        opened = int(holding.finish()["requests"])
    return figures(at_start, held, opened)


def figures(at_start: int, held: int, opened: int) -> Figures:
    each = (held - at_start) / opened
    return {
        "start_mb": at_start / MB,
        "opened": opened,
        "bytes_per_connection": each,
        "mb_per_10k": each * PER / MB,
    }
