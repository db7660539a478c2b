"""What this host's proxy added to each exchange of a stream: a small histogram with explicit bounds. Pure."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from agent.outcome import Percentiles

# Microseconds. 2,000 is the bound the service level is stated at, so it is one exactly.
BOUNDS_US = (10, 15, 20, 25, 30, 40, 50, 65, 80, 100, 130, 160, 200, 250, 300, 400, 500, 750, 1000, 1500, 2000, 3000,
             5000, 10000, 25000, 50000, 100000)  # fmt: skip
_NOTHING = (-1, *(0 for _ in range(len(BOUNDS_US) + 1)))


class AddedLatency:
    """An exchange is bytes one way and then bytes back. Each way costs from the wake-up that found the bytes ready to
    the end of the write that passed them on; an exchange adds the first cost of each way."""

    __slots__ = ("cells",)

    def __init__(self) -> None:
        # The cost of the request whose answer has not come yet, or -1; then the buckets. The engine counts here too.
        self.cells = array("q", _NOTHING)

    @property
    def counts(self) -> Sequence[int]:
        return self.cells[1:]

    def request(self, cost_ns: int) -> None:
        if self.cells[0] < 0:
            self.cells[0] = cost_ns

    def response(self, cost_ns: int) -> None:
        if self.cells[0] >= 0:
            self.cells[1 + bisect_left(BOUNDS_US, (self.cells[0] + cost_ns) / 1000)] += 1
            self.cells[0] = -1

    def percentiles(self) -> Percentiles | None:
        """Upper bound of the bucket each falls into; the last bucket answers with twice the last bound."""
        counts = self.counts
        total = sum(counts)
        if not total:
            return None
        return Percentiles(_quantile(counts, total * 0.50), _quantile(counts, total * 0.99))


def _quantile(counts: Sequence[int], rank: float) -> float:
    seen = 0
    for bound, number in zip((*BOUNDS_US, 2 * BOUNDS_US[-1]), counts, strict=True):
        seen += number
        if seen >= rank:
            return bound / 1000
    raise AssertionError("a rank beyond the total")
