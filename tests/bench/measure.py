"""One arm at one work: run the load, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.arms import Arm
from tests.bench.load import Client, Said
from tests.bench.process import cpu_seconds, settle
from tests.bench.record import Figures
from tests.bench.works import Kind, Plan, Work

PER = 100_000  # requests
_LATENCIES = ("p50_us", "p99_us", "p999_us")


def measure(arm: Arm, work: Work, plan: Plan) -> Figures:
    return run(arm.client(), work, plan, arm.pids)


def run(client: Client, work: Work, plan: Plan, pids: Callable[[], list[int]]) -> Figures:
    """The CPU time counts until all is quiet again: what is put off has to be done all the same."""
    settle(pids)
    at_start = 0.0

    def note_start() -> None:
        nonlocal at_start
        at_start = cpu_seconds(pids())

    options = {"connections": work.connections, "size": work.size, "seconds": plan.seconds, "warmup": plan.warmup}
    if work.rate:
        options["rate"] = work.rate
    mode = Kind.RR if work.kind is Kind.SAME_HOST else work.kind
    said = client.run(mode.value, note_start, **options)
    settle(pids)
    return figures(work, said, cpu_seconds(pids()) - at_start)


def figures(work: Work, said: Said, cpu_s: float) -> Figures:
    """`said` as the load generator ended (pure). No CPU figure where no process was between client and server."""
    if work.kind is Kind.BULK:
        gigabytes = said["bytes"] / 1e9
        return {"mb_per_s": gigabytes * 1000 / said["seconds"], **_cpu("cpu_s_per_gb", cpu_s, gigabytes)}
    rate = "connects_per_s" if work.kind is Kind.CPS else "requests_per_s"
    return {
        rate: said["requests"] / said["seconds"],
        **{name: said[name] for name in _LATENCIES if name in said},
        **_cpu("cpu_s_per_100k", cpu_s, said["requests"] / PER),
    }


def _cpu(name: str, cpu_s: float, amount: float) -> Figures:
    return {name: cpu_s / amount} if cpu_s and amount else {}
